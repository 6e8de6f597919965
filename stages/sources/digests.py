"""sha256 of local files, remembered by path, size, modification time and inode."""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.identity import sha256_file
from stages.runtime import from_environment

RACY_SECONDS = 2.0
"""A file changed this recently may change again within the same time stamp: its digest is not remembered."""


def digests(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file. Unchanged files are not read again."""
    memory = from_environment().cache / "digests.json"
    known = _read(memory)
    states = {path: _state(path) for path in paths}
    missing = [path for path in states if known.get(str(path.resolve()), [None])[1:] != states[path]]
    if missing:
        # hashlib lets go of the interpreter lock, so threads do run side by side.
        with ThreadPoolExecutor() as pool:
            found = dict(zip(missing, pool.map(sha256_file, missing), strict=True))
        settled = {p: d for p, d in found.items() if time.time() - p.stat().st_mtime > RACY_SECONDS}
        known |= {str(path.resolve()): [digest, *states[path]] for path, digest in settled.items()}
        if settled:
            _write(memory, known)
        return [found.get(path) or known[str(path.resolve())][0] for path in paths]
    return [known[str(path.resolve())][0] for path in paths]


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read(memory: Path) -> dict[str, list[Any]]:
    try:
        found = json.loads(memory.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}  # only a memory: it fills again
    return found if isinstance(found, dict) else {}


def _write(memory: Path, known: dict[str, list[Any]]) -> None:
    aside = memory.with_name(f"{memory.name}.{os.getpid()}")
    with suppress(OSError):  # a full disk costs the memory only
        memory.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(known), "utf-8")
        aside.replace(memory)
