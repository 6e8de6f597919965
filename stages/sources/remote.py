"""Reading a file that is elsewhere: a stream that goes on where a broken connection left it, and a download that a
later attempt goes on with.

What knows the protocol (`stages.sources.web`, `stages.sources.urls`) gives an `open_at(position)`, which raises
`Passing` for what may mend itself and UserError for what will not, above all when the file is another by now.
"""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from stages.errors import UserError

TRIES = 6
"""Attempts in a row that bring nothing before a file is given up."""
WAIT = 1.0
"""Seconds before the second attempt; each further wait is twice as long."""
LONGEST_WAIT = 60.0
CHUNK = 1 << 20


class Passing(Exception):
    """Something that may not happen again: try once more, not before `wait` seconds."""

    def __init__(self, told: str, wait: float = 0.0) -> None:
        super().__init__(told)
        self.wait = wait


class Opened(Protocol):
    """What `open_at` gives: bytes from a position on. `read` may return less than asked for; raises Passing."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""

    def close(self) -> None:
        """End the connection."""


OpenAt = Callable[[int], Opened]


class Wait:
    """Waits between attempts, longer each time; gives up after `TRIES` that brought nothing."""

    def __init__(self) -> None:
        self.tried = 0

    def __call__(self, error: Passing, told: str) -> None:
        """Raises UserError instead of waiting once too often."""
        self.tried += 1
        if self.tried >= TRIES:
            raise UserError(f"{told}: {error} ({self.tried} attempts)") from error
        time.sleep(min(LONGEST_WAIT, max(error.wait, WAIT * 2 ** (self.tried - 1) * random.uniform(0.75, 1.25))))

    def forget(self) -> None:
        """Something came: the failures before it do not count any more."""
        self.tried = 0


def tries() -> Iterator[Wait]:
    """The same `Wait`, for ever: it ends the loop by raising."""
    wait = Wait()
    while True:
        yield wait


class Remote:
    """The bytes of a remote file from `position` on, whatever happens to the connection on the way."""

    def __init__(self, name: str, open_at: OpenAt, size: int | None, position: int = 0) -> None:
        self.name, self.open_at, self.size, self.position = name, open_at, size, position
        self.wait = Wait()
        self.opened: Opened | None = None

    def read(self, size: int = CHUNK) -> bytes:
        """At least one byte, or none at the end. Raises UserError when the file is another, or cannot be read."""
        while True:
            if self.size is not None and self.position >= self.size:
                return b""
            try:
                self.opened = self.opened or self.open_at(self.position)
                data = self.opened.read(size)
                if not data and self.size is not None:
                    raise Passing(f"the connection ended after {self.position} of {self.size} bytes")
            except Passing as error:
                self.close()
                self.wait(error, f"cannot read {self.name}")
                continue
            self.position += len(data)
            if data:
                self.wait.forget()
            return data

    def length(self) -> int:
        """Bytes of the file; of one that nobody told the size of, those that were read."""
        return self.position if self.size is None else self.size

    def close(self) -> None:
        """End the connection, if there is one."""
        if self.opened is not None:
            self.opened.close()
            self.opened = None

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def download(name: str, open_at: OpenAt, size: int | None, target: Path, told: Callable[[int], None]) -> None:
    """Bring the file to `target`, or what is missing of it there. `told` hears the bytes so far.

    Raises UserError when it is another file by now, or when it cannot be read.
    """
    here = target.stat().st_size if target.exists() else 0
    if size is None or here > size:  # without a size nobody can tell whether what is here is all
        here = 0
    with Remote(name, open_at, size, here) as stream, target.open("r+b" if here else "wb") as sink:
        sink.seek(here)
        while chunk := stream.read():
            sink.write(chunk)
            told(stream.position)
