"""How far long transfers to and from a store have come, for whoever shows it; digests that are found on the way.

with watching(show), moving("uploaded", 2_000_000_000) as moved: ...    # `moved(n)`: n bytes more are there
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

LONG = 64 * 2**20
"""Bytes from which a transfer is worth telling."""
EVERY = 0.25
"""Seconds between two tellings."""

Watcher = Callable[[str, int, int], None]
"""Told what happens (`uploaded`, `downloaded`), bytes done, bytes in all."""
Moved = Callable[[int], None]

_watchers: list[Watcher] = []


def nobody(size: int) -> None:
    """Nobody watches."""


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of the transfers of this process while the block runs."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def moving(what: str, size: int) -> Iterator[Moved]:
    """A transfer of `size` bytes, from any number of threads."""
    if size < LONG or not _watchers:
        yield nobody
        return
    done, told, lock = 0, 0.0, threading.Lock()

    def moved(more: int) -> None:
        nonlocal done, told
        with lock:
            done = min(done + more, size)
            now = time.monotonic()
            if now - told < EVERY and done < size:
                return
            told = now
            for watcher in tuple(_watchers):
                watcher(what, done, size)

    moved(0)
    yield moved


class Growing:
    """The sha256 of a file that is written from beginning to end, found while it grows: to hash 20 GB afterwards
    takes as long as to bring them. Use it as a context around the writing; `sha256` is there when that went well."""

    BLOCK = 8 * 2**20
    UNWRITTEN = 2**20
    """More than a file object may keep back of what it was given."""

    def __init__(self, path: Path) -> None:
        self.path, self.sha256 = path, ""
        self._there, self._ended, self._broken = 0, False, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def grew(self, more: int) -> None:
        """So many bytes more were written."""
        with self._changed:
            self._there += more
            self._changed.notify()

    def __enter__(self) -> "Growing":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._ended, self._broken = True, error is not None  # then nobody waits for the rest to be read
            self._changed.notify()
        self._thread.join()
        if error is not None:
            self.sha256 = ""

    def _follow(self) -> None:
        with suppress(OSError):  # nothing was written, for which the writing has an error
            self.sha256 = self._hashed()

    def _hashed(self) -> str:
        digest, read = hashlib.sha256(), 0
        while not self._broken and (end := self._written(read)) is not None:
            with self.path.open("rb") as file:
                file.seek(read)
                while not self._broken and read < end and (block := file.read(min(self.BLOCK, end - read))):
                    digest.update(block)
                    read += len(block)
        with self.path.open("rb") as file:
            file.seek(read)
            while not self._broken and (block := file.read(self.BLOCK)):
                digest.update(block)
        return digest.hexdigest()

    def _written(self, read: int) -> int | None:
        """Waits until there is more to read, and gives how far it goes for sure; None when all is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._there - read > self.BLOCK + self.UNWRITTEN)
            return None if self._ended else self._there - self.UNWRITTEN
