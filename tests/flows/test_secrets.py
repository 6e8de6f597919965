"""No secret leaves the environment: everything that a run leaves behind, and every command line while it runs, is
searched for secrets that were planted."""

import json
import os
import subprocess
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from prefect.blocks.system import Secret
from pydantic import ValidationError

from stages.runtime import Runtime
from tests.conftest import ADMIN, S3, _client
from tests.flows.raised import Raised, free_port
from tests.flows.rehearsal import Rehearsal
from tests.stages.web_server import Page, web_server


def planted(name: str) -> str:
    return f"planted-{name}-{uuid4().hex}"


def test_a_runtime_with_a_secret_in_it_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"storage_options.secret looks like a secret.*`secret: env:NAME`"):
        Runtime(storage_options={"endpoint_url": "http://127.0.0.1:1", "secret": "abcdefgh"})
    assert Runtime(storage_options={"secret": "env:SOMEWHERE", "profile": "team"}).storage_options


class CommandLines(threading.Thread):
    """Every command line of this machine's processes that was seen while it watched."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.seen = threading.Event(), set[bytes]()

    def run(self) -> None:
        while not self.done.wait(0.1):
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(entry.read_bytes())
                except OSError:  # it has ended
                    continue

    def __enter__(self) -> "CommandLines":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.join()


def left_behind(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()


@pytest.mark.full
def test_a_secret_of_a_block_reaches_the_worker_s_run_and_nothing_else(s3: S3, raised: Raised, tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path, url=s3.url)
    parameters = rehearsal.ready(20)  # all but the card, which the run then writes to the bucket
    environment = {**s3.environment, "AWS_SECRET_ACCESS_KEY": "{{ prefect.blocks.secret.store-key }}"}
    with raised.client() as client:
        Secret(value=ADMIN[1]).save("store-key", overwrite=True)
        run = raised.send("finetune/recipe", parameters, environment)
        state = raised.ended(run).state
        assert state and state.is_completed(), state
        shown = client._client.get(f"/flow_runs/{run}").text
        asked = {"flow_runs": {"id": {"any_": [str(run)]}}, "logs": {"flow_run_id": {"any_": [str(run)]}}}
        for what in ("logs", "task_runs", "artifacts"):
            shown += client._client.post(f"/{what}/filter", json=asked).raise_for_status().text
    assert rehearsal.stands, "the key opened the bucket"
    assert "{{ prefect.blocks.secret.store-key }}" in shown and "publish" in shown
    fs = _client(s3.endpoint)
    kept = [fs.cat_file(path).decode(errors="replace") for path in fs.find(s3.bucket)]
    kept += [data.decode(errors="replace") for _, data in left_behind(tmp_path)]
    assert kept and not [text for text in (shown, *kept) if ADMIN[1] in text]


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_nothing_that_a_run_leaves_or_shows_holds_a_secret(
    s3: S3, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "ROWS_AUTHORIZATION": f"Bearer {planted('rows')}",
        "HF_TOKEN": planted("hub"),
        "WANDB_API_KEY": planted("tracker"),
        "OPENAI_API_KEY": planted("api"),
        "PREFECT_SERVER_API_AUTH_STRING": f"admin:{planted('server')}",
    }
    secrets["PREFECT_API_AUTH_STRING"] = secrets["PREFECT_SERVER_API_AUTH_STRING"]
    for name, value in {**secrets, "BUCKET_KEY": ADMIN[0], "BUCKET_SECRET": ADMIN[1]}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")  # the bucket's secret is given by reference alone
    looked_for = [value.rpartition(" ")[2].rpartition(":")[2] for value in {*secrets.values(), ADMIN[1]}]
    looked_for += [b64encode(secrets["PREFECT_API_AUTH_STRING"].encode()).decode()]
    turns = [{"role": "user", "content": "say abc"}, {"role": "assistant", "content": "abc"}]
    rows = json.dumps({"messages": turns, "question": "say abc", "answer": "abc"}) + "\n"
    home = tmp_path / "regrow" / "prefect"
    raised = Raised(home, free_port())
    with web_server() as web, CommandLines() as lines:
        for name in ("rows", "heldout"):
            text = rows * 20 if name == "rows" else rows.replace("abc", "xyz") * 4
            web.pages[f"/{name}.jsonl"] = Page(text.encode(), needs=secrets["ROWS_AUTHORIZATION"])
        headers = {"headers": {"Authorization": "env:ROWS_AUTHORIZATION"}}
        recipe = {
            "name": "guarded",
            "fetch": {
                "model": {"path": str(tiny_model)},
                "data": {
                    "rows": {"files": f"{web.url}/rows.jsonl", "storage_options": headers},
                    "heldout": {"files": f"{web.url}/heldout.jsonl", "storage_options": headers, "split": "heldout"},
                },
            },
            "pack": {"sequence_length": 128, "global_batch": 4, "deduplicate": False},
            "train": {"lora": {"rank": 2}, "max_steps": 2},
            "evaluate": {"tasks": {"echo": {"source": "heldout", "max_new_tokens": 4}}},
            "publish": {"to": f"s3://{s3.bucket}/published", "gate": {"require": "nothing"}},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        options = {"key": "env:BUCKET_KEY", "secret": "env:BUCKET_SECRET", "endpoint_url": s3.endpoint}
        runtime = {"storage_options": options, "device": "cpu", "cache": str(tmp_path / "regrow" / "cache")}
        (tmp_path / "runtime.yaml").write_text(yaml.safe_dump(runtime))
        monkeypatch.setattr(Raised, "regrow", with_secrets)
        try:
            told = raised.up()
            words = ("run", str(tmp_path / "recipe.yaml"), "--runtime", str(tmp_path / "runtime.yaml"))
            told += raised.regrow(*words, "--on", "up")
            told += raised.regrow("show", "guarded", "--json") + raised.regrow("history", "guarded")
        finally:
            raised.regrow("down", "--home", str(home))
    fs = _client(s3.endpoint)
    delivered = [(path, fs.cat_file(path)) for path in fs.find(f"{s3.bucket}/published")]
    assert any(path.endswith("README.md") for path, _ in delivered), told
    (tmp_path / "runtime.yaml").unlink()
    found = [
        (where, secret)
        for where, data in (
            *left_behind(tmp_path),
            *delivered,
            ("screen", told.encode()),
            *((str(c), c) for c in lines.seen),
        )
        for secret in looked_for
        if secret.encode() in data
    ]
    assert found == []
    assert any(b"stages.child" in line for line in lines.seen), "the run's processes were seen"
    assert any(path.endswith("prefect.db") for path, _ in left_behind(tmp_path)), "the server's database was searched"


def with_secrets(raised: Raised, *arguments: str, expect: int = 0) -> str:
    """The command, with the server's own settings in its environment too."""
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        env={**os.environ, "COLUMNS": "80", "XDG_DATA_HOME": str(raised.home.parents[1])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
