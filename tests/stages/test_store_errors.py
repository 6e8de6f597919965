"""What a person meets when the store's place is wrong: one clear line, within seconds, without secrets."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.cache import begun
from stages.errors import UserError
from stages.identity import Action
from stages.objects.memory import MemoryObjects
from stages.store import _check_conditions, open_store
from tests.wrong_clock import wrong_clock

SECRET = "a-secret-that-nobody-may-see"


def refusal(url: str, cache: Path, **options: str) -> str:
    """The one line that opening a store fails with, which comes soon and holds no secret."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        open_store(url, cache, options)
    assert time.monotonic() - started < 15
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message
    return message


def test_a_folder_that_cannot_be_made(tmp_path: Path, somebody: None) -> None:
    assert "/proc/store" in refusal("/proc/store", tmp_path / "cache")
    assert "cannot be written" in refusal("/store-of-somebody", tmp_path / "cache")


def test_a_store_that_belongs_to_others(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    open_store(str(tmp_path / "store"), tmp_path / "cache")
    for folder in (tmp_path / "store", tmp_path / "store" / "tmp"):
        folder.chmod(0o555)
    request.getfixturevalue("somebody")
    assert "cannot be written" in refusal(str(tmp_path / "store"), tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store = open_store(str(tmp_path / "store"), tmp_path / "closed" / "cache")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "a").write_bytes(b"a")
    artifact = store.commit(Action("pack", {}, {}, {}), tmp_path / "output", {}, {})
    for folder in (tmp_path / "closed", tmp_path / "closed" / "cache"):
        folder.chmod(0o555)
    request.getfixturevalue("somebody")
    with pytest.raises(UserError, match=r"closed/cache: .*REGROW_CACHE"):
        store.view(artifact.tree)


def test_somebody_without_rights_can_use_a_store_of_their_own(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tmp_path.chmod(0o777)
    request.getfixturevalue("somebody")
    store = open_store(str(tmp_path / "store"), tmp_path / "cache")
    for n in (1, 2):
        output = tmp_path / f"output{n}"
        output.mkdir()
        (output / "a").write_bytes(b"a")
        artifact = store.commit(Action("pack", {}, {"n": n}, {}), output, {}, {})
        view = store.view(artifact.tree)
        with pytest.raises(PermissionError):
            (view / "a").write_bytes(b"b")
        with pytest.raises(PermissionError):
            (view / "b").write_bytes(b"b")
    view.chmod(0o755)
    (view / "a").unlink()
    assert (store.view(artifact.tree) / "a").read_bytes() == b"a"


def test_a_download_that_another_user_began_is_no_hindrance(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with begun(tmp_path / "cache", "blob") as theirs:
        theirs.write_bytes(b"half")
    theirs.chmod(0o444)
    (tmp_path / "cache" / "lock").chmod(0o666)
    theirs.parent.chmod(0o777)
    request.getfixturevalue("somebody")
    with begun(tmp_path / "cache", "blob") as ours:
        ours.write_bytes(b"whole")
        assert theirs.read_bytes() == b"half"
    assert list(theirs.parent.iterdir()) == [theirs]


def test_a_file_where_the_store_should_be(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("x")
    assert "a file stands there" in refusal(str(tmp_path / "store"), tmp_path / "cache")
    assert "a file stands there" in refusal(str(tmp_path / "store" / "below"), tmp_path / "cache")


def test_a_scheme_that_is_not_served(tmp_path: Path) -> None:
    assert "gs://bucket/prefix" in refusal("ftp://host/prefix", tmp_path)


def test_a_store_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "format.json").write_text('{"format": 99}')
    assert "upgrade" in refusal(str(tmp_path / "store"), tmp_path / "cache")


@pytest.mark.parametrize(
    "left", [b"", b'{"format": 1', b"\xff", b"[]"], ids=["nothing", "half", "no text", "no document"]
)
@pytest.mark.parametrize("path", ["format.json", "refs/bot/production.json", "runs/run-1.json"])
def test_what_was_damaged_is_named_and_may_be_deleted(path: str, left: bytes, tmp_path: Path) -> None:
    def look() -> None:
        store = open_store(str(tmp_path / "store"), tmp_path / "cache")
        store.read_ref("bot/production")
        store.read_run("run-1")
        list(store.runs())

    look()
    damaged = tmp_path / "store" / path
    damaged.parent.mkdir(parents=True, exist_ok=True)
    damaged.write_bytes(left)
    with pytest.raises(UserError, match=rf"store: {path} is damaged: .*delete it"):
        look()
    damaged.unlink()
    look()


def on_a_small_disk(folder: Path, code: str) -> str:
    """What the code prints when `small` is a disk of two megabytes."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs the right to mount")
    (folder / "small").mkdir()
    mounted = 'mount -t tmpfs -o size=2m none small && exec "$0" -c "$1"'
    command = ["unshare", "-m", "sh", "-c", mounted, sys.executable, code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.failure(
    what="the store's disk is full (a small mount)",
    outcome="one clear error; nothing half written is visible",
)
def test_a_full_disk_is_told_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    code = """
import sys, pathlib
from stages.errors import UserError
from stages.identity import Action
from stages.store import open_store
store = open_store("small/store", pathlib.Path("cache"))
for name, size in {"large": 3 << 20, "little": 1 << 10}.items():
    (output := pathlib.Path(name)).mkdir()
    (output / "a").write_bytes(bytes(size))
    action = Action("pack", {}, {"name": name}, {})
    try:
        store.commit(action, output, {}, {})
    except UserError as error:
        print(error)
        assert store.find("pack", action.key) is None and not list(store.objects.list("tmp/"))
    else:
        assert store.find("pack", action.key) and name == "little"
"""
    told = on_a_small_disk(tmp_path, code)
    assert "small/store: the disk is full" in told and told.count("\n") == 1


def test_a_full_disk_is_told_whichever_library_met_it(tmp_path: Path) -> None:
    code = """
import pathlib
import numpy, pyarrow, pyarrow.feather, safetensors.numpy
from stages.errors import UserError
from stages.objects import full_disk_told
numbers = numpy.zeros(1 << 20)
for write in (
    lambda: safetensors.numpy.save_file({"a": numbers}, "small/a"),
    lambda: pyarrow.feather.write_feather(pyarrow.table({"a": numbers}), "small/b", compression="uncompressed"),
    lambda: pathlib.Path("small/c").write_bytes(numbers.tobytes()),
):
    try:
        with full_disk_told(pathlib.Path("small")):
            write()
    except UserError as error:
        print(error)
"""
    assert on_a_small_disk(tmp_path, code).count("small: the disk is full") == 3


def test_wrong_credentials(s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for options in ({"key": "admin-key", "secret": SECRET}, {"key": "nobody", "secret": SECRET}, {"anon": "true"}):
        message = refusal(s3.url, tmp_path, **options)
        assert "refused these credentials" in message and s3.bucket in message and "AWS_ACCESS_KEY_ID" in message


@pytest.mark.failure(
    what="a machine whose clock is wrong uses a bucket",
    outcome="the server refuses its signatures, and one clear error names the clock: nothing is read or written",
)
@pytest.mark.parametrize("by", ["+2y", "-2y"])
def test_a_wrong_clock_is_refused_by_a_bucket_and_told(by: str, s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, "-m", "flows.cli", "show", "--store", s3.url]
    environment = {**os.environ, **wrong_clock(by, tmp_path), "REGROW_CACHE": str(tmp_path)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert told.returncode == 2 and "Traceback" not in told.stderr, told
    message = " ".join(told.stderr.split())
    assert "its clock is wrong (RequestTimeTooSkewed)" in message and "set it right" in message


def test_no_credentials(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no credentials were found" in refusal(s3.url, tmp_path)


def test_credentials_that_may_only_read(s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    reader = {"key": "reader-key", "secret": "reader-secret-reader-secret"}
    assert "these credentials may not write there (PutObject)" in refusal(
        s3.url, tmp_path, **reader
    )  # none to read yet
    open_store(s3.url, tmp_path)
    store = open_store(s3.url, tmp_path, reader)
    assert store.find("pack", "0" * 64) is None
    with pytest.raises(UserError, match=r"may not write there \(PutObject\).* the rights of a worker"):
        store.write_run("run", {})


def test_no_such_bucket(s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "there is no bucket 'no-such-bucket'" in refusal("s3://no-such-bucket/store", tmp_path)


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid:9000", "https://127.0.0.1:{port}", "127.0.0.1:9000"]
)
def test_an_endpoint_that_is_not_there(s3, tmp_path: Path, endpoint: str) -> None:  # type: ignore[no-untyped-def]
    endpoint = endpoint.format(port=s3.endpoint.rpartition(":")[2])
    message = refusal(s3.url, tmp_path, endpoint_url=endpoint, key="key", secret=SECRET)
    assert endpoint in message


@pytest.mark.full
def test_an_endpoint_that_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        message = refusal("s3://bucket/store", tmp_path, endpoint_url=endpoint, key="key", secret=SECRET)
    assert "cannot be reached" in message and endpoint in message


def test_an_address_or_option_that_makes_no_sense(tmp_path: Path) -> None:
    assert "environment" in refusal(f"s3://key:{SECRET}@bucket/prefix", tmp_path)
    assert "endpoint_url" in refusal("s3://bucket/prefix", tmp_path, endpoint="http://127.0.0.1:9000")
    for url in ("", "s3://", "az://", "gs://", "file://"):
        assert "s3://bucket/prefix" in refusal(url, tmp_path)


class Heedless(MemoryObjects):
    """A server that accepts conditional writes and ignores the condition, as some do."""

    def create(self, path: str, data: bytes) -> str | None:
        self.put(path, data)
        return "version"


def test_a_server_that_ignores_conditions_is_not_used() -> None:
    with pytest.raises(UserError, match="ignores conditional writes"):
        _check_conditions(Heedless("heedless"))
