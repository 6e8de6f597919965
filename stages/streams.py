"""Inputs of which a part is on the disk at a time, so that they may be larger than it.

A stage names such inputs in `Stage.streamed`. It gets an empty folder for each, and says which folders it needs in
there (`Work.show`). Files come out of the store as those of a view do, by hard link or through the local cache and
verified. When they leave they leave the cache, too, unless something else shows them.

    <work>/streamed.json            what there is to show, by input
    <work>/streamed/0/tokens/…      what is shown now; several ranks have a folder each

What a killed attempt left is found again by the next one.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple
from pathlib import Path
from threading import Thread

from stages.identity import File, Tree
from stages.manifest import check_paths
from stages.runtime import Runtime, store_of
from stages.store import Store
from stages.views import bring, release, spread

THREADS = 4
"""Files fetched at once."""


def prepare(work: Path, trees: Mapping[str, Tree]) -> dict[str, Path]:
    """Write down what there is to show to a stage with that work folder; return the folders in which it will stand."""
    for tree in trees.values():
        check_paths(tree)
    if trees:
        listed = {name: [astuple(file) for file in tree.files] for name, tree in trees.items()}
        (work / "streamed.json").write_text(json.dumps(listed))
    return {name: _folder(work, name, 0) for name in trees}


def _folder(work: Path, name: str, rank: int) -> Path:
    folder = work / "streamed" / str(rank) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Streams:
    """The streamed inputs of a stage as one of its processes sees them. `show` is what `Work.show` says."""

    def __init__(self, work: Path, runtime: Runtime, rank: int = 0) -> None:
        listing = work / "streamed.json"
        listed = json.loads(listing.read_text()) if listing.exists() else {}
        self.folders = {name: _folder(work, name, rank) for name in listed}
        """Where each input stands."""
        self._files = {name: Tree(tuple(File(*file) for file in files)).folders() for name, files in listed.items()}
        self._work, self._runtime = work, runtime
        self._store: tuple[int, Store] | None = None
        self._fetching: dict[str, _Fetching] = {}

    def show(self, name: str, now: Collection[str], then: Collection[str] = ()) -> None:
        """See `stages.stage.Show`."""
        if name not in self.folders:  # a plain folder, with everything in it
            return
        if fetching := self._fetching.pop(name, None):
            fetching.settle()
        for path in self._files[name].keys() - {*now, *then}:
            if (self.folders[name] / path).is_dir():
                self._forget(name, path)
        self._bring(name, now)
        if then:
            self._fetching[name] = _Fetching(lambda: self._bring(name, then))

    def _bring(self, name: str, paths: Collection[str]) -> None:
        store, folder = self._opened(), self.folders[name]
        files = [(folder / path, file) for path in paths for file in self._files[name][path].files]
        with (self._work / "streamed.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # what one rank fetches, the next one finds
            try:
                for _ in spread(
                    lambda each: bring(store.objects, store.cache, *each, store.cache_limit), files, THREADS
                ):
                    pass
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone would leave it to a process forked meanwhile

    def _forget(self, name: str, path: str) -> None:
        folder = self.folders[name] / path
        for file in self._files[name][path].files:
            (folder / file.path).unlink(missing_ok=True)
            release(self._runtime.cache, file)
        shutil.rmtree(folder)

    def _opened(self) -> Store:
        """The store, opened by this process: connections do not outlive a fork."""
        if self._store is None or self._store[0] != os.getpid():
            self._store = os.getpid(), store_of(self._runtime, reached=True)
        return self._store[1]


class _Fetching:
    """A thread that fetches. It does not keep a process from ending."""

    def __init__(self, fetch: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, args=(fetch,), daemon=True)
        self._thread.start()

    def _run(self, fetch: Callable[[], None]) -> None:
        try:
            fetch()
        except BaseException as error:  # told to whom it concerns, in `settle`
            self._error = error

    def settle(self) -> None:
        """Return when it is done. Raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
