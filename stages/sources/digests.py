"""sha256 of local files, remembered by path, size, modification time and inode; and what only stands for a file."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.errors import UserError
from stages.identity import sha256_file
from stages.sources.memory import recall, remember

RACY_SECONDS = 2.0
"""A file changed this recently may change again within the same time stamp: its digest is not remembered."""


def digests(paths: Sequence[Path], cache: Path) -> list[str]:
    """The sha256 of each file. Unchanged files are not read again: `cache` is the folder where that is remembered."""
    memory = cache / "digests.json"
    known = recall(memory)
    states = {path: _state(path) for path in paths}
    missing = [path for path in states if known.get(str(path.resolve()), [None])[1:] != states[path]]
    if missing:
        # hashlib lets go of the interpreter lock, so threads do run side by side.
        with ThreadPoolExecutor() as pool:
            found = dict(zip(missing, pool.map(sha256_file, missing), strict=True))
        settled = {p: d for p, d in found.items() if time.time() - p.stat().st_mtime > RACY_SECONDS}
        known |= {str(path.resolve()): [digest, *states[path]] for path, digest in settled.items()}
        if settled:
            remember(memory, known)
        return [found.get(path) or known[str(path.resolve())][0] for path in paths]
    return [known[str(path.resolve())][0] for path in paths]


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small file begins that Git has in the place of a large one."""
POINTER_BYTES = 1024
"""Bytes that such a file has at most."""


def refuse_pointers(paths: Iterable[Path], place: str) -> None:
    """Raise UserError for a file that only stands for one, as a clone of a repository without Git LFS has them."""
    for path in paths:
        if path.stat().st_size < POINTER_BYTES:
            refuse_pointer(path.name, path.read_bytes(), place)


def refuse_pointer(name: str, data: bytes, place: str) -> None:
    """The same for the bytes of one file."""
    if data.startswith(POINTER):
        raise UserError(
            f"{place}: {name} is a Git LFS pointer, which only stands for the file: run `git lfs pull` in the "
            "repository that it was cloned from"
        )
