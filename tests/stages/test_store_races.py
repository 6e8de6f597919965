"""Many processes, one artifact: one winner whom all adopt; and a process killed at any step leaves a sound store."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from stages.gc import verify
from stages.identity import Action, sha256_file
from stages.objects import blob_path
from stages.store import open_store

CLOUDS = [pytest.param(cloud, marks=pytest.mark.full) for cloud in ("azure", "google")]
ALSO_S3 = pytest.mark.parametrize("shared_url", ["folder", "s3", *CLOUDS], indirect=True)
S3_IF_FULL = pytest.mark.parametrize(
    "shared_url", ["folder", pytest.param("s3", marks=pytest.mark.full), *CLOUDS], indirect=True
)
DRIVER = str(Path(__file__).with_name("store_driver.py"))


def drive(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, DRIVER, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def at_once(processes: "list[subprocess.Popen[str]]") -> list[str]:
    """Let processes go when all are ready; what each said last."""
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return said


@ALSO_S3
def test_an_object_is_created_once(shared_url: str, tmp_path: Path) -> None:
    store, times = open_store(shared_url, tmp_path / "cache"), 60 if "://" in shared_url else 600
    racers = [drive("create", shared_url, tmp_path, f"racer{n}", times) for n in range(3)]
    results = [json.loads(line) for line in at_once(racers)]
    assert sorted(n for result in results for n in result["won"]) == list(range(times))
    for result in results:
        for n in result["won"]:
            found = store.objects.read(f"refs/race/{n}.json")
            assert found is not None and found.data == result["name"].encode()


@S3_IF_FULL
def test_compare_and_swap_loses_no_step(shared_url: str, tmp_path: Path) -> None:
    store, times = open_store(shared_url, tmp_path / "cache"), 20 if "://" in shared_url else 200
    store.objects.create("refs/number.json", b"0")
    assert at_once([drive("swap", shared_url, tmp_path, times) for _ in range(3)]) == ["done\n"] * 3
    found = store.objects.read("refs/number.json")
    assert found is not None and int(found.data) == 3 * times


@pytest.mark.failure(
    what="four processes commit one artifact at once",
    outcome="one wins, the others adopt what it made",
)
@ALSO_S3
def test_many_processes_race_for_one_artifact(shared_url: str, tmp_path: Path) -> None:
    open_store(shared_url, tmp_path / "cache")
    said = at_once([drive("race", shared_url, tmp_path, f"racer{n}") for n in range(4)])
    results = [json.loads(line) for line in said]
    assert {r["name"] for r in results} == {f"racer{n}" for n in range(4)}
    assert len({(r["digest"], r["made_by"]) for r in results}) == 1
    store = open_store(shared_url, tmp_path / "cache")
    assert verify(store, deep=True).problems == []
    assert list(store.objects.list("superseded/")) == []


@S3_IF_FULL
def test_a_lease_keeps_processes_apart(shared_url: str, tmp_path: Path) -> None:
    number = tmp_path / "number"
    number.write_text("0")
    open_store(shared_url, tmp_path / "cache")
    assert at_once([drive("count", shared_url, tmp_path, number) for _ in range(3)]) == ["done\n"] * 3
    assert number.read_text() == "30"


@pytest.mark.failure(
    what="a process is killed at any step of a commit, a replacement or a checkpoint",
    outcome="the store holds the old or the new whole, never half; the rest is swept by gc",
)
@S3_IF_FULL
@pytest.mark.parametrize("does", ["commit", "replace", "checkpoint"])
def test_a_process_killed_at_any_step_leaves_a_sound_store(shared_url: str, tmp_path: Path, does: str) -> None:
    process = drive("kills", shared_url, tmp_path, does)
    said, _ = process.communicate()
    assert process.returncode == 0
    assert int(said) >= 5  # as many steps as it takes, each of which was the last one once


@pytest.mark.failure(
    what="the bucket's server is killed while an artifact is stored, and comes back",
    outcome="the commit waits and ends whole",
)
@pytest.mark.full
def test_an_outage_of_the_server_is_waited_out(s3_server_of_ones_own, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    server, s3 = s3_server_of_ones_own
    store = open_store(s3.url, tmp_path / "cache")
    (tmp_path / "output").mkdir()
    for n in range(60):
        (tmp_path / "output" / str(n)).write_bytes(b"%d" % n * 1000)
    action = Action("pack", {}, {}, {})
    begun = threading.Event()

    class Watched:
        def __getattr__(self, name: str) -> object:
            if name == "upload":
                begun.set()
            return getattr(store.objects, name)

    with ThreadPoolExecutor(1) as pool:
        committing = pool.submit(
            replace(store, objects=Watched()).commit,  # type: ignore[arg-type]
            *(action, tmp_path / "output", {}, {}),
        )
        assert begun.wait(30)
        server.kill()
        assert not committing.done()
        server.start()
        artifact = committing.result(timeout=120)
    assert store.find("pack", action.key) == artifact
    assert verify(store, deep=True).problems == []


@pytest.mark.failure(
    what="a process is killed half way through the upload of a large file",
    outcome="nothing of the file is to be seen; the next upload brings it whole",
)
@pytest.mark.full
@pytest.mark.parametrize("shared_url", ["s3", "azure", "google"], indirect=True)
def test_an_upload_in_blocks_that_breaks_off_leaves_nothing_to_be_seen(shared_url: str, tmp_path: Path) -> None:
    source, back = tmp_path / "model", tmp_path / "back"
    source.write_bytes(os.urandom(72 * 2**20))  # more than Azure's client sends in one request
    sha256 = sha256_file(source)
    objects = open_store(shared_url, tmp_path / "cache").objects
    with drive("upload", shared_url, tmp_path, source) as dies:
        assert dies.wait() == -signal.SIGKILL
    assert objects.stat(blob_path(sha256)) is None and not list(objects.list("blobs/"))
    objects.upload(source, blob_path(sha256), sha256)
    [entry] = objects.list("blobs/")
    assert entry.path == blob_path(sha256) and entry.size == source.stat().st_size
    objects.download(blob_path(sha256), back)
    assert sha256_file(back) == sha256
