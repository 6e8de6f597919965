"""Downloads range by range, several at once, going on where an earlier one broke off.

The ranges are written in order, so what a download left is whole up to its length, and that length is all there is to
note. Whether its bytes are right only the whole file's sha256 tells, as a power cut may have left something else.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from stages.objects.network import taken_back
from stages.transfers import Growing, Moved

RANGE = 8 * 2**20
"""Bytes asked for together."""
AT_ONCE = 4
"""Ranges of one file that are on their way or wait for one before them."""


class Piece(NamedTuple):
    """Some bytes of an object, more than were asked for where the server knows no ranges; how many it has in all."""

    data: bytes
    size: int


Ask = Callable[[int, int], Piece | None]
"""The bytes from one place up to before another, fewer at the object's end; None where the object ends before them."""


def all_from(start: int, data: bytes) -> Piece | None:
    """What to make of an answer that is all of the object, as of a server that knows no ranges."""
    return Piece(data[start:], len(data)) if start < len(data) else None


def download_in_ranges(ask: Ask, target: Path, moved: Moved) -> str:
    """Have a file hold an object's bytes, of which it may hold some already; its sha256. Raises what `ask` raises, and
    then the file holds what came."""
    return taken_back(lambda heard: _download(ask, target, heard), moved)


def _download(ask: Ask, target: Path, moved: Moved) -> str:
    with Growing(target) as growing, target.open("ab") as file, ThreadPoolExecutor(AT_ONCE) as pool:

        def came(data: bytes) -> None:
            file.write(data)
            growing.grew(len(data))
            moved(len(data))

        at = file.tell()
        growing.grew(at)
        moved(at)
        first = ask(at, at + RANGE)
        if first is not None:
            came(first.data)
            waiting: deque[Future[Piece | None]] = deque()
            for start in range(at + len(first.data), first.size, RANGE):
                waiting.append(pool.submit(ask, start, min(start + RANGE, first.size)))
                if len(waiting) == AT_ONCE:
                    came(_data(waiting.popleft()))
            while waiting:
                came(_data(waiting.popleft()))
    return growing.sha256


def _data(asked: "Future[Piece | None]") -> bytes:
    piece = asked.result()
    return piece.data[:RANGE] if piece else b""
