"""How far long transfers to and from a store have come, for whoever shows it.

with watching(show), moving("uploaded", 2_000_000_000) as moved: ...    # `moved(n)`: n bytes more are there
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
