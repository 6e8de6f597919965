"""Processes that work on one store at once or are killed while they do. Run by the tests beside it::

python store_driver.py race URL FOLDER NAME      commit one action with bytes of one's own, when told to on stdin
python store_driver.py count URL FOLDER FILE     add one to a number in a file under a lease, ten times
python store_driver.py hold URL FOLDER           take a lease and hold it until killed
python store_driver.py upload URL FOLDER FILE    send a file and die when half of it is there
python store_driver.py view URL FOLDER KEY       bring what pack made with that key and die when half of it is there
python store_driver.py kills URL FOLDER DOES     kill a fresh process at every step of a commit or checkpoint
"""

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages import transfers
from stages.checkpoints import drop_checkpoints, fetch_checkpoint, latest_checkpoint, save_checkpoint
from stages.gc import collect
from stages.identity import Action, sha256_file, tree_of
from stages.lease import lease
from stages.objects import Objects, blob_path
from stages.store import Store, open_store

ACTION = Action("train", {"train": 1}, {"rate": 1e-3}, {"tokens": "0" * 64})
FILES = {"weights/model": b"w" * 100_000, "train.json": b"{}"}


def race(url: str, folder: Path, name: str) -> None:
    store = open_store(url, folder / name / "cache")
    output = write(folder / name / "output", {**FILES, "train.json": name.encode()})
    print("ready", flush=True)
    sys.stdin.readline()
    artifact = store.commit(ACTION, output, {"made_by": name}, {})
    assert tree_of(store.view(artifact.tree)).digest == artifact.digest
    print(json.dumps({"name": name, "digest": artifact.digest, "made_by": artifact.facts["made_by"]}))


def create(url: str, folder: Path, name: str, times: str) -> None:
    objects = open_store(url, folder / "cache").objects
    print("ready", flush=True)
    sys.stdin.readline()
    won = [n for n in range(int(times)) if objects.create(f"refs/race/{n}.json", name.encode()) is not None]
    print(json.dumps({"name": name, "won": won}))


def swap(url: str, folder: Path, times: str) -> None:
    objects = open_store(url, folder / "cache").objects
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(int(times)):
        while True:
            found = objects.read("refs/number.json")
            assert found is not None
            if objects.swap("refs/number.json", f"{int(found.data) + 1:09}".encode(), found.version):
                break
    print("done")


def count(url: str, folder: Path, file: str) -> None:
    store, number = open_store(url, folder / "cache"), Path(file)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(10):
        with lease(store, "train", ACTION.key, 5.0, f"process {os.getpid()}") as held:
            before = int(number.read_text())
            number.write_text("")  # whoever comes in now finds no number
            number.write_text(str(before + 1))
            assert not held.lost.is_set()
    print("done")


def hold(url: str, folder: Path) -> None:
    with lease(open_store(url, folder / "cache"), "train", "0" * 64, 300.0, "the holder"):
        print("ready", flush=True)
        signal.pause()


def upload(url: str, folder: Path, file: str) -> None:
    objects, source, sent = open_store(url, folder / "dying").objects, Path(file), 0
    size, sha256 = source.stat().st_size, sha256_file(source)

    def moved(more: int) -> None:
        nonlocal sent
        sent += more
        if size // 2 < sent < size:
            os.kill(os.getpid(), signal.SIGKILL)

    objects.upload(source, blob_path(sha256), sha256, moved)


def view(url: str, folder: Path, key: str) -> None:
    store = open_store(url, folder / "dying")
    found = store.find("pack", key)
    assert found is not None

    def told(_: str, done: int, size: int) -> None:
        if size // 2 < done < size:
            os.kill(os.getpid(), signal.SIGKILL)

    transfers.EVERY = 0.0
    with transfers.watching(told):
        store.view(found.tree)


@dataclass(frozen=True)
class KilledAt:
    """Objects whose process dies just before the n-th primitive is called."""

    objects: Objects
    left: list[int]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.objects, name)
        if not callable(found):
            return found

        def step(*arguments: Any) -> Any:
            die_at(self.left)
            return found(*arguments)

        return step


def die_at(left: list[int]) -> None:
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def kills(url: str, folder: Path, does: str) -> None:
    """For every n: a process that dies at its n-th step, until one lives to the end; then a look at all they left.

    In a folder a step is any call that touches a file (by Python's audit events), elsewhere any primitive. This
    process itself never opens a bucket: its children are forks, and a client's threads do not survive one.
    """
    prepare, act, look = {
        "commit": (lambda store, n, folder: None, commit, committed),
        "replace": (commit_before, commit, committed),
        "checkpoint": (checkpoint_before, checkpoint, checkpointed),
    }[does]
    if library := {"s3": "s3fs", "az": "adlfs", "gs": "gcsfs"}.get(url.partition("://")[0]):
        importlib.import_module(library)  # once, not in every child

    def live_or_die(n: int) -> None:
        store = open_store(url, folder / str(n) / "cache")
        prepare(store, n, folder / str(n) / "before")
        act(mortal(store, n), n, folder / str(n) / "output")

    def look_at_all(last: int) -> None:
        store = open_store(url, folder / "cache")
        for n in range(1, last + 1):
            look(store, n, folder / str(n) / "look", prepared=does == "replace", done=n == last)
        collect(store, delete=True, run_days=0, grace=-5)
        assert not list(store.objects.list("tmp/")) and not list(store.objects.list("blobs/"))

    n = 1
    while status := forked(live_or_die, n):
        assert status == -signal.SIGKILL, f"step {n}: {status}"
        n += 1
    assert forked(look_at_all, n) == 0, "what a killed process left is not sound"
    print(n)


def forked(function: Callable[[int], None], n: int) -> int:
    """The exit status of a child that runs a function."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(n)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def mortal(store: Store, n: int) -> Store:
    """A store with which this process dies at the n-th step."""
    left = [n]
    if store.objects.local("") is None:
        return replace(store, objects=KilledAt(store.objects, left))
    sys.addaudithook(lambda event, _: die_at(left) if event in TOUCHES else None)
    return store


TOUCHES = ("open", "os.link", "os.rename", "os.chmod", "os.remove", "os.mkdir", "os.utime", "os.truncate")


def action(n: int) -> Action:
    return replace(ACTION, config={"try": n})


def made(n: int, when: str) -> dict[str, bytes]:
    """Files of which some are every try's and some only this one's."""
    return {**FILES, "train.json": f"{n} {when}".encode()}


def digest(files: dict[str, bytes], folder: Path) -> str:
    return tree_of(write(folder, files)).digest


def commit_before(store: Store, n: int, folder: Path) -> None:
    """An artifact that stands already."""
    store.commit(action(n), write(folder, made(n, "before")), {}, {})


def commit(store: Store, n: int, folder: Path) -> None:
    store.commit(action(n), write(folder, made(n, "now")), {}, {}, replace=True)


def committed(store: Store, n: int, folder: Path, prepared: bool, done: bool) -> None:
    found = store.find("train", action(n).key)
    assert found is not None or not (prepared or done)
    if found is not None:
        assert store.missing(found.tree) == []
        assert tree_of(store.view(found.tree)).digest == found.digest
        allowed = {digest(made(n, when), folder / when) for when in ("now", "before")[: 1 if done else 2]}
        assert found.digest in allowed


def checkpoint_before(store: Store, n: int, folder: Path) -> None:
    """Two checkpoints that are there already."""
    for step in (10, 20):
        save_checkpoint(store, action(n).key, "before", step, write(folder / str(step), made(n, str(step))))


def checkpoint(store: Store, n: int, folder: Path) -> None:
    """The third checkpoint of a key, whose completion deletes the first."""
    save_checkpoint(store, action(n).key, "now", 30, write(folder, made(n, "30")))


def checkpointed(store: Store, n: int, folder: Path, prepared: bool, done: bool) -> None:
    found = latest_checkpoint(store, action(n).key)
    assert found is not None and found.step in ((30,) if done else (20, 30))
    fetch_checkpoint(store, found, folder / "restored")
    assert tree_of(folder / "restored").digest == digest(made(n, str(found.step)), folder / "expected")
    if done:
        assert {e.path.split("/")[3] for e in store.objects.list(f"checkpoints/{action(n).key}/")} == {
            "0000000020",
            "0000000030",
        }
        drop_checkpoints(store, action(n).key)
        assert latest_checkpoint(store, action(n).key) is None


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


if __name__ == "__main__":
    does: dict[str, Callable[..., None]] = {
        "race": race,
        "create": create,
        "swap": swap,
        "count": count,
        "hold": hold,
        "upload": upload,
        "view": view,
        "kills": kills,
    }
    does[sys.argv[1]](sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
