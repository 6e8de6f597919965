"""The local cache keeps within its bound, drops the least recently used, and never what somebody is using."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Event
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages import cache, views
from stages.cache import Hold
from stages.identity import Action, Tree
from stages.runtime import Runtime
from stages.store import Store, open_store
from tests.stages.conftest import MakeFolder

DRIVER = Path(__file__).with_name("cache_driver.py")
BLOB = 1000
"""Bytes of the files here."""


def made(store: Store, folder: Path, *contents: int) -> Tree:
    """An artifact of files of BLOB bytes, one a number."""
    for n in contents:
        (folder / str(n)).parent.mkdir(parents=True, exist_ok=True)
        (folder / str(n)).write_bytes(bytes([n]) * BLOB)
    return store.commit(Action("pack", {"pack": 1}, {"files": list(contents)}, {}), folder, {}, {}).tree


def far(folder: Path, limit: float) -> Store:
    """A store that is not on this disk."""
    return open_store(f"memory://{uuid4().hex}", folder / "cache", cache_limit=limit)


def in_cache(store: Store) -> set[str]:
    return {path.name for path in (store.cache / "blobs").rglob("*") if path.is_file()}


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = far(tmp_path, 3 * BLOB)
    trees = [made(store, tmp_path / str(n), n) for n in range(4)]
    for n in (0, 1, 2, 0, 3):
        with store.hold() as hold:
            os.utime(store.view(trees[n], hold), ns=(n, n))  # times that a quick test cannot tell apart otherwise
    left = [tree for tree in trees if (store.cache / "views" / tree.digest).exists()]
    assert len(left) == 3 and trees[3] in left and cache.size_of(store.cache) <= 3 * BLOB


def test_what_a_commit_leaves_in_the_cache_counts_too(tmp_path: Path) -> None:
    store = far(tmp_path, 2 * BLOB)
    for n in range(5):
        made(store, tmp_path / str(n), n)
    assert cache.size_of(store.cache) <= 2 * BLOB and len(in_cache(store)) == 2


def test_a_store_on_the_same_disk_costs_nothing(tmp_path: Path, store: Store) -> None:
    tree = made(store, tmp_path / "some", 1, 2, 3)
    store.view(tree)
    assert cache.size_of(store.cache) == 0


def test_what_is_more_than_the_bound_is_there_as_long_as_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = far(tmp_path, BLOB)
    large, small = made(store, tmp_path / "large", 1, 2, 3), made(store, tmp_path / "small", 4)
    with store.hold() as hold, store.hold() as other:
        view = store.view(large, hold)
        store.view(small, other)
        assert sorted(path.name for path in view.iterdir()) == ["1", "2", "3"]
        assert "more than the cache's limit (REGROW_CACHE_LIMIT)" in caplog.text
    assert cache.size_of(store.cache) <= BLOB


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["view", "commit", "let go"]), st.sets(st.integers(0, 7), min_size=1, max_size=4)),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS, limit=st.integers(0, 8))
def test_whatever_is_done_what_is_held_stays_and_the_rest_keeps_within_the_bound(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, set[int]]], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("bounded")
    store = far(folder, limit * BLOB)
    held: list[tuple[Hold, Path, set[int]]] = []
    for operation, contents in operations:
        if operation == "let go":
            while held:
                held.pop()[0].close()
            continue
        tree = made(store, folder / uuid4().hex, *sorted(contents))
        if operation == "view":
            hold = store.hold()
            held.append((hold, store.view(tree, hold), contents))
        for _, view, shown in held:
            assert {path.name: path.read_bytes() for path in view.iterdir()} == {
                str(n): bytes([n]) * BLOB for n in shown
            }
        needed = len(set().union(*(shown for _, _, shown in held))) if held else 0
        assert cache.size_of(store.cache) <= max(limit, needed) * BLOB
    for hold, _, _ in held:
        hold.close()


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[str]"]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_processes_that_share_a_cache_never_lose_what_they_use(
    tmp_path: Path, make_folder: MakeFolder, processes: list["subprocess.Popen[str]"]
) -> None:
    store = open_store(str(tmp_path / "store"), tmp_path / "elsewhere")
    chance = random.Random(0)
    for n in range(12):
        files = {f"{i}": chance.randbytes(20_000) for i in range(chance.randint(1, 6))}
        store.commit(Action("pack", {"pack": 1}, {"n": n}, {}), make_folder(files), {}, {})
    command = [sys.executable, str(DRIVER), store.url, str(tmp_path / "cache"), "200000"]
    for seed in range(4):
        processes.append(subprocess.Popen([*command, str(seed), "60"], stdout=subprocess.PIPE, text=True))
    victim = subprocess.Popen([*command, "9", "forever"], stdout=subprocess.PIPE, text=True)
    processes.append(victim)
    assert victim.stdout is not None and victim.stdout.readline() == "holding\n"
    victim.send_signal(signal.SIGKILL)
    for process in processes[:4]:
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and told.endswith("60 views, all whole\n")
    cache.make_room(tmp_path / "cache", 0, 100_000)
    assert cache.size_of(tmp_path / "cache") <= 100_000, "the dead hold nothing"
    assert [p for p in (tmp_path / "cache" / "views").iterdir() if p.name.startswith(".")] == []
    for blob in (p for p in (tmp_path / "cache" / "blobs").rglob("*") if p.is_file()):
        assert sha256(blob.read_bytes()).hexdigest() == blob.name


def test_a_bucket_s_copies_are_bounded(s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = open_store(s3.url, tmp_path / "cache", cache_limit=2 * BLOB)
    trees = [made(store, tmp_path / str(n), n) for n in range(4)]
    for tree in trees:
        with store.hold() as hold:
            assert [p.stat().st_size for p in store.view(tree, hold).iterdir()] == [BLOB]
    assert cache.size_of(tmp_path / "cache") <= 2 * BLOB


def test_the_limit_is_set_by_a_size_or_the_disk(tmp_path: Path) -> None:
    assert Runtime.model_validate({"cache": tmp_path, "cache_limit": "200GB"}).cache_bytes == 200 * 10**9
    disk = os.statvfs(tmp_path)
    assert Runtime(cache=tmp_path / "not" / "there").cache_bytes == disk.f_blocks * disk.f_frsize // 2


def test_what_goes_away_while_the_cache_is_swept_is_no_error(tmp_path: Path) -> None:
    """As when another process has just finished what it wrote to `tmp/`."""
    busy, done = tmp_path / "tmp", Event()
    busy.mkdir()
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "gone").symlink_to("nowhere")  # listed, and not there any more

    def come_and_go() -> None:
        while not done.is_set():
            for number in range(200):
                (busy / str(number)).touch()
            for number in range(200):
                (busy / str(number)).unlink()

    with ThreadPoolExecutor() as pool:
        going = pool.submit(come_and_go)
        try:
            for _ in range(30):
                views.sweep(tmp_path, 0.0, True)
        finally:
            done.set()
        going.result()
