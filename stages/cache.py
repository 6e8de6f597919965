"""The local cache's bound: copies of what a store holds elsewhere stay below a number of bytes; the least recently used
go first.

What counts is what would be free on this disk: cached blobs, files that only views have, and downloads that broke off.
A view that is hard-linked from a store on the same disk costs nothing; checkpoints, scratch and logs are not copies and
do not count.

A view in use is held. A holder is a locked file in `held/` with the names of views in it; the kernel releases the lock
when the process ends, however it ends. Holding and dropping are done alone (`lock`), so a name is either held before
somebody looks for what may go, or its view is gone before the holder looks for it. Room for a download is made before
it begins and stands in the same file, so the downloads of several processes together stay below the bound too. What is
held stays even where it is more than the bound allows.

A download is written to `begun/` under the name of its blob, locked while somebody is at it. What broke off stays there
for the next one to go on with, and is let go like any other copy.
"""

import fcntl
import logging
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache as once
from itertools import chain
from math import inf
from pathlib import Path
from uuid import uuid4

from stages.objects import clear_errors

_log = logging.getLogger(__name__)


class Hold:
    """Views that stay until this is closed, or its process ends."""

    def __init__(self, cache: Path, limit: float = inf) -> None:
        """Nothing is held yet. The cache may have `limit` bytes. Raises UserError when it cannot be written."""
        self.cache, self.limit = cache, limit
        self.path = cache / "held" / uuid4().hex
        with clear_errors(cache):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(cache):
                self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                fcntl.flock(self.file, fcntl.LOCK_EX)

    def add(self, name: str) -> None:
        """Hold the view called so, be it there or not."""
        with _alone(self.cache):
            self._note(name, 0)

    def reserve(self, name: str, size: int) -> None:
        """Hold the view called so, and make room for `size` bytes that are to come into it."""
        with _alone(self.cache):
            if not _enter(self.cache, size, self.limit):
                _warn(self.cache)
            self._note(name, size)

    def came(self, name: str, left: int) -> None:
        """Of the reserved room, `left` bytes are not used yet: the others are in the cache and count there."""
        self._note(name, left)

    def outlive_exec(self) -> None:
        """Go on holding when another program takes this process over."""
        os.set_inheritable(self.file, True)

    def close(self) -> None:
        """Hold nothing any more. What stood above the bound for it goes."""
        with _alone(self.cache):
            self.path.unlink(missing_ok=True)
            os.close(self.file)
            _enter(self.cache, 0, self.limit)

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _note(self, name: str, size: int) -> None:
        os.write(self.file, f"{name} {size}\n".encode())


_of_this_process: dict[Path, Hold] = {}


def for_good(cache: Path, limit: float = inf) -> Hold:
    """The hold of this process, until it ends."""
    if cache not in _of_this_process or not _of_this_process[cache].path.exists():
        _of_this_process[cache] = Hold(cache, limit)
    return _of_this_process[cache]


def make_room(cache: Path, size: int, limit: float) -> bool:
    """Let the least recently used go until so many bytes more are below the limit. Whether they are."""
    with _alone(cache):
        return _enter(cache, size, limit)


def used(blob: Path) -> None:
    """Note that a blob was used just now. Its modification time, which vouches for its bytes, stays."""
    with suppress(OSError):  # gone, or somebody else's
        os.utime(blob, ns=(time.time_ns(), blob.stat().st_mtime_ns))


@contextmanager
def begun(cache: Path, name: str) -> Iterator[Path]:
    """Where to write a download, which may hold the beginning of it from one that broke off. It is this block's alone,
    and does not count while the block runs. Where somebody else is at the same, it is a file of one's own."""
    with _alone(cache):
        path = cache / "begun" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
        if file is None:
            path = path.with_name(f"{name}.{uuid4().hex}")
            file = _locked(path)
    assert file is not None
    try:
        yield path
    finally:
        if path.name != name or not os.fstat(file).st_size:  # nothing to go on with
            path.unlink(missing_ok=True)
        _unlock(file)


@contextmanager
def if_free(lock: Path) -> Iterator[bool]:
    """Whether nobody holds this lock, a file; then it is this block's."""
    file = _locked(lock)
    try:
        yield file is not None
    finally:
        if file is not None:
            _unlock(file)


def broke_off(cache: Path, name: str) -> bool:
    """Whether there is a download of that name to go on with."""
    return (cache / "begun" / name).exists()


def sweep_begun(cache: Path, before: float, delete: bool) -> list[int]:
    """The sizes of the downloads that nobody is at or wrote to since `before`; `delete` removes them."""
    with _alone(cache):
        found = [each for each in files_below(cache / "begun") if each[1].st_mtime < before and not _under_way(each[0])]
        for path, _ in found if delete else ():
            path.unlink(missing_ok=True)
    return [stat.st_size for _, stat in found]


def size_of(cache: Path) -> int:
    """Bytes that count."""
    return _look(cache, _held(cache)).size


def idle_views(cache: Path, before: float) -> list[Path]:
    """The views that nobody holds or asked for since `before`."""
    names = _held(cache)
    found = []
    for view in (cache / "views").glob("*"):
        with suppress(FileNotFoundError):  # just dropped
            if view.name not in names and view.stat().st_mtime < before:
                found.append(view)
    return found


def drop_views(cache: Path, before: float) -> None:
    """Remove those."""
    with _alone(cache):
        for folder in idle_views(cache, before):
            _drop(folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder of views, read-only folders included."""
    for place, _, _ in os.walk(folder):
        Path(place).chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


def files_below(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files below a folder in which others come and go."""
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield Path(place, name), Path(place, name).stat()


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _enter(cache: Path, size: int, limit: float) -> bool:
    """Enter bytes into the account and shrink the cache where it runs over. The account only ever says too much, and
    is set right by looking, so that a cache of many files is looked through only when that may free something."""
    if limit == inf:
        return True
    account = cache / "size"
    try:
        counted = int(account.read_text())
    except (FileNotFoundError, ValueError):
        counted = None
    if counted is None or counted + size > limit:
        counted = _shrink(cache, limit - size)
    with suppress(OSError):  # a full disk: an account that cannot be read is set right by looking
        account.write_text(str(counted + size))
    return counted + size <= limit


@dataclass
class _Unit:
    """What goes together: a view with the blobs that nothing else shows, or a blob that no view shows."""

    used: float
    folder: Path | None
    files: dict[int, int]
    """Sizes by inode."""


@dataclass
class _Contents:
    units: list[_Unit] = field(default_factory=list)
    blobs: dict[int, list[Path]] = field(default_factory=lambda: defaultdict(list))
    """Names in `blobs/` and `begun/` by inode."""
    shown: Counter[int] = field(default_factory=Counter)
    """How many names in views an inode has."""
    size: int = 0
    """Bytes that count, with the room that is reserved."""


def _shrink(cache: Path, limit: float) -> int:
    """Drop the least recently used until the limit is kept, or only what is held is left. Returns what is left."""
    names = _held(cache)
    found = _look(cache, names)
    for unit in sorted(found.units, key=lambda unit: unit.used):
        if found.size <= limit:
            break
        if unit.folder is not None:
            if unit.folder.name in names:
                continue
            _drop(unit.folder)
        for inode, size in unit.files.items():
            found.shown[inode] -= unit.folder is not None
            if not found.shown[inode]:
                for path in found.blobs.get(inode, ()):
                    path.unlink(missing_ok=True)
                found.size -= size
    return found.size


@once
def _warn(cache: Path) -> None:
    _log.warning("%s: what runs need now is more than the cache's limit (REGROW_CACHE_LIMIT)", cache)


def _look(cache: Path, names: dict[str, int]) -> _Contents:
    found = _Contents(size=sum(names.values()))
    sizes: dict[int, int] = {}
    links: dict[int, int] = {}
    last: dict[int, float] = {}
    broken_off = (each for each in files_below(cache / "begun") if not _under_way(each[0]))
    for path, stat in chain(files_below(cache / "blobs"), broken_off):
        found.blobs[stat.st_ino].append(path)
        sizes[stat.st_ino], links[stat.st_ino], last[stat.st_ino] = stat.st_size, stat.st_nlink, stat.st_atime
    for folder in (cache / "views").glob("*"):
        files: dict[int, int] = {}
        for _, stat in files_below(folder):
            found.shown[stat.st_ino] += 1
            files[stat.st_ino] = sizes[stat.st_ino] = stat.st_size
            links[stat.st_ino] = stat.st_nlink
        with suppress(FileNotFoundError):
            found.units.append(_Unit(folder.stat().st_mtime, folder, files))
    found.units += [_Unit(at, None, {i: sizes[i]}) for i, at in last.items() if not found.shown[i]]
    ours = {i for i, count in links.items() if i in found.blobs or count <= found.shown[i]}
    for unit in found.units:
        unit.files = {inode: size if inode in ours else 0 for inode, size in unit.files.items()}
    found.size += sum(size for inode, size in sizes.items() if inode in ours)
    return found


def _locked(path: Path) -> int | None:
    """A file made if need be, opened and locked; None if somebody else has locked it, or another user owns it."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except PermissionError:
            if not path.exists():  # it is the folder in which nothing can be written
                raise
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # it was a blob by then


def _unlock(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it to a process forked meanwhile
    os.close(file)


def _under_way(path: Path) -> bool:
    """Whether somebody downloads to a file just now. Only to be asked alone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):  # or it just ended
        return True
    return False


def _held(cache: Path) -> dict[str, int]:
    """The views that living processes hold, with the room reserved for each."""
    found: dict[str, int] = {}
    for path in (cache / "held").glob("*"):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                own = dict(line.split(" ") for line in file.read().decode().splitlines())
                for name, size in own.items():
                    found[name] = max(found.get(name, 0), int(size))
            else:
                path.unlink(missing_ok=True)  # its process is dead
    return found


def _drop(folder: Path) -> None:
    """Remove a view: at once for whoever looks, then its files."""
    aside = folder.with_name(f".{uuid4().hex}")
    with suppress(FileNotFoundError):
        folder.rename(aside)
        remove_folder(aside)
