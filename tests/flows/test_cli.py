"""The command as a whole: bad input is one clear line with the way out and an exit code, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli
from flows.execute import StageFailed
from flows.options import runtime_of
from flows.server import Api
from stages.child import Suspended
from stages.errors import UserError
from stages.store import BadBlob, open_store
from tests.conftest import S3
from tests.stages.web_server import Page, web_server

GOOD = {"messages": [{"role": "user", "content": "say hi"}, {"role": "assistant", "content": "hi"}]}


@dataclass(frozen=True)
class User:
    """Somebody with a recipe, its rows, and a home of their own."""

    folder: Path
    model: Path
    environment: dict[str, str] = field(default_factory=dict)

    def write(self, rows: list[Any] | None, **sections: Any) -> None:
        """Rows (none for a file that is not there) and the recipe that reads them."""
        if rows is not None:
            (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "name": "mine",
            "fetch": {
                "model": {"path": str(self.model)},
                "data": {"chats": {"files": str(self.folder / "rows.jsonl")}},
            },
            "pack": {"sequence_length": 64, "global_batch": 1},
            "publish": {"to": str(self.folder / "out")},
        }
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | sections))

    def run(self, *arguments: str, prefix: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
        """`regrow run recipe.yaml +pack`."""
        names = ("PREFECT_", "REGROW_")
        return subprocess.run(
            [*prefix, sys.executable, "-m", "flows.cli", "run", "recipe.yaml", "+pack", *arguments],
            cwd=self.folder,
            env={
                **{n: v for n, v in os.environ.items() if not n.startswith(names)},
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "XDG_DATA_HOME": str(self.folder / "home"),
                "COLUMNS": "80",
                **self.environment,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )

    def refused(self, *arguments: str, code: int = 2, without: str = "fetch", **more: Any) -> str:
        """The one line of the error. Nothing of the stage `without` may be in the store, nor anything half-written."""
        done = self.run(*arguments, **more)
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr
        error, *further = done.stderr.splitlines()
        assert error.startswith("error: ")
        assert (
            all(line.startswith("continue with: regrow run recipe.yaml +pack") for line in further) and len(further) < 2
        )
        assert not (self.folder / "out").exists()
        store = self.folder / "home" / "regrow" / "store"
        if store.is_dir():
            assert without not in {stage for stage, _, _ in open_store(str(store), self.folder / "cache").manifests()}
            assert not [path for path in (store / "tmp").rglob("*") if path.is_file()]
        return error.removeprefix("error: ")


@pytest.fixture
def user(tmp_path: Path, tiny_model: Path) -> User:
    return User(tmp_path, tiny_model, {"PREFECT_API_URL": "http://127.0.0.1:9/api"})


def test_a_file_that_is_missing_or_empty(user: User) -> None:
    user.write(None)
    assert f"fetch.data.chats.files: there is no file {user.folder}/rows.jsonl" in user.refused()
    user.write([])
    assert "rows.jsonl is empty" in user.refused()


def test_a_recipe_that_is_none(user: User) -> None:
    user.write([GOOD], pak={})
    assert user.refused() == "recipe.yaml:11: unknown key `pak`; did you mean `pack`?"
    (user.folder / "recipe.yaml").write_text("name: [mine\n")
    assert user.refused().startswith("recipe.yaml:2: not valid YAML")


def test_a_store_that_cannot_be_written(user: User) -> None:
    user.write([GOOD])
    assert user.refused("--store", "/proc/store").startswith("/proc/store")


@pytest.mark.parametrize("content", [b"- store: mine\n", b"store\n", b"store: [\n", b"\xff\xfe", b"42: 1\n"])
def test_a_runtime_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "runtime.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"runtime\.yaml") as refused:
        runtime_of(None, file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("micro_batch: yes", r"runtime `micro_batch`: expected a number.*runtime\.yaml"),
        ("cache_limit: on", r"runtime `cache_limit`: expected a number"),
        ("workers: 010", r"runtime\.yaml:2: 010 is 8 in YAML"),
        ("lease_seconds: 1:30", r"runtime\.yaml:2: 1:30 is 90 in YAML"),
        ("store: two", r"runtime\.yaml:2: the key `store` stands here twice"),
    ],
)
def test_what_yaml_reads_otherwise_than_people_is_refused_in_a_runtime_file(
    tmp_path: Path, line: str, told: str
) -> None:
    file = tmp_path / "runtime.yaml"
    file.write_text(f"store: one\n{line}\n")
    with pytest.raises(UserError, match=told):
        runtime_of(None, file)


def test_json_is_refused_for_a_run_that_is_sent_elsewhere(user: User) -> None:
    user.write([GOOD])
    assert "--json" in user.refused("--on", "up", "--json")


@pytest.mark.parametrize("on", ["here", "up"])
@pytest.mark.parametrize(
    ("version", "password", "says"),
    [
        (b'"2.19.3"', "", "server: 2.19.3. Major versions must match.): start one of this version there"),
        (b'"3.0.0"', "Basic eDp5", "wants a password: set PREFECT_API_AUTH_STRING=user:password"),
        (None, "", "cannot be used (Client error '404 Not Found'"),
    ],
)
def test_a_prefect_server_that_cannot_be_used(
    user: User, version: bytes | None, password: str, says: str, on: str
) -> None:
    user.write([GOOD])
    with web_server() as web:
        if version:
            web.pages["/api/admin/version"] = Page(version, needs=password)
        one = User(user.folder, user.model, {"PREFECT_API_URL": f"{web.url}/api"})
        told = one.refused("--on", on)
    assert told.startswith(f"PREFECT_API_URL: the Prefect server {web.url}/api ") and says in told
    _ended_or_none(user)


def test_a_prefect_server_that_is_down(user: User) -> None:
    user.write([GOOD])
    says = "PREFECT_API_URL: the Prefect server http://127.0.0.1:9/api cannot be used ([Errno 111] Connection refused)"
    assert user.refused().startswith(says)
    _ended_or_none(user)


def _ended_or_none(user: User) -> None:
    store = open_store(str(user.folder / "home" / "regrow" / "store"), user.folder / "cache")
    assert {record["status"] for _, record in store.runs()} <= {"failed"}


@pytest.mark.full
def test_a_server_that_does_not_start(user: User) -> None:
    user.write([GOOD])
    broken = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////proc/nowhere/prefect.db"}
    told = User(user.folder, user.model, broken).refused()
    assert told.startswith("Prefect's server did not start and ended with exit code ")
    log = Path(told.rpartition("its log: ")[2])
    assert "unable to open database file" in log.read_text()


def refused_by_a_stage(user: User, prefect_api: Api, rows: list[Any], without: str, **sections: Any) -> str:
    user.write(rows, **sections)
    return User(user.folder, user.model, {"PREFECT_API_URL": prefect_api.url}).refused(without=without)


def test_a_row_that_is_bad(user: User, prefect_api: Api) -> None:
    told = refused_by_a_stage(user, prefect_api, [GOOD, {"text": "x"}], "convert", convert={"format": "messages"})
    assert "rows.jsonl, line 2: messages is missing" in told and "convert.bad_rows: drop" in told


@pytest.mark.full
@pytest.mark.parametrize(
    ("rows", "sections", "stage", "says"),
    [
        (
            [GOOD, {"messages": [{"role": "wizard", "content": "x"}]}],
            {},
            "convert",
            ("line 2", "wizard", "convert.roles"),
        ),
        ([GOOD], {"convert": {"template": "{{ raise_exception('no') }}"}}, "convert", ("refuses it: no",)),
        ([{"messages": GOOD["messages"][:1]}], {}, "pack", ("nothing to train on", "pack.train_on")),
        (
            [GOOD, {"messages": [{"role": "user", "content": "x" * 500}, GOOD["messages"][1]]}],
            {"pack": {"sequence_length": 64, "overlong": "error"}},
            "pack",
            ("row 2", "pack.sequence_length 64"),
        ),
    ],
)
def test_what_a_stage_refuses(
    user: User, prefect_api: Api, rows: list[Any], sections: dict[str, Any], stage: str, says: tuple[str, ...]
) -> None:
    told = refused_by_a_stage(user, prefect_api, rows, stage, **sections)
    assert all(each in told for each in says), told


@pytest.mark.full
def test_a_model_without_a_chat_template(user: User, prefect_api: Api) -> None:
    bare = user.folder / "bare"
    shutil.copytree(user.model, bare, ignore=shutil.ignore_patterns("chat_template*"))
    fetch = {"model": {"path": str(bare)}, "data": {"chats": {"files": str(user.folder / "rows.jsonl")}}}
    assert "`convert.template: chatml`" in refused_by_a_stage(user, prefect_api, [GOOD], "convert", fetch=fetch)


@pytest.mark.full
def test_wrong_credentials(user: User, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-nobody-may-see")
    user.write([GOOD])
    told = user.refused("--store", s3.url)
    assert "refused these credentials" in told and "AWS_ACCESS_KEY_ID" in told and "nobody-may-see" not in told


@pytest.mark.full
def test_a_full_disk(user: User, prefect_api: Api) -> None:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs the right to mount")
    user.write([{**GOOD, "n": os.urandom(1000).hex()} for _ in range(2000)])
    (user.folder / "small").mkdir()
    small = 'mount -t tmpfs -o size=2m none small && exec "$0" "$@"'
    one = User(user.folder, user.model, {"PREFECT_API_URL": prefect_api.url})
    told = one.refused("--store", "small/store", code=2, prefix=("unshare", "-m", "sh", "-c", small))
    assert "small/store: the disk is full" in told


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (StageFailed("train failed: RuntimeError"), 1, "train failed: RuntimeError"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (UserError("rows.jsonl: no"), 2, "rows.jsonl: no"),
        (BadBlob({"ab" * 32: "is missing"}), 1, "the store is damaged: blob abababababab… is missing; `regrow verify`"),
        (Suspended("saved its state"), 75, "saved its state"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(standalone_mode: bool) -> None:
        error.add_note("continue with: regrow run [x]")
        raise error

    monkeypatch.setattr(cli, "app", ends)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert says in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("command", [["up"], ["serve", "bot"]])
@pytest.mark.parametrize("port", ["0", "70000"])
def test_a_port_that_is_none(command: list[str], port: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["regrow", *command, "--port", port])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.EXIT_USER
    assert "Invalid value for '--port'" in capsys.readouterr().err
