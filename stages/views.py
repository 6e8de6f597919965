"""Views: read-only local folders that show an artifact's files, each blob's sha256 checked on the way in.

Layout of the local cache, which may be deleted whenever nothing runs::

    blobs/ab/abcd…      copies of blobs whose store is not a folder on the same disk
    views/<digest>/     one folder a tree, hard-linked from the store or from `blobs/`; `views/.…` is being made
    verified/           which inode was found to hold which blob, so that a model is not hashed at every stage
    begun/              downloads under way or broken off
    held/ lock size     which views are in use, and how much there is: see `stages.cache`
    tmp/                copies under way

Inputs too large for one disk are not viewed but brought in parts and released again: `stages.streams`.

A file counts as verified while its inode, size and modification time stay what they were when it was hashed, or when
it was committed right after; silent decay of the disk is what `verify --deep` is for.
"""

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from math import inf
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from stages.cache import (
    Hold,
    begun,
    broke_off,
    drop_views,
    files_below,
    idle_views,
    make_room,
    remove_folder,
    sweep_begun,
    used,
)
from stages.identity import File, Tree, sha256_file
from stages.manifest import check_paths
from stages.objects import Objects, blob_path, clear_errors
from stages.objects.folder import copy_file
from stages.transfers import Moved, moving, nobody

FRESH = 100_000_000
"""Nanoseconds for which a file's modification time is too young to tell a later change apart."""

_log = logging.getLogger(__name__)
A = TypeVar("A")
B = TypeVar("B")


class BadBlob(Exception):
    """Blobs that are missing or hold other bytes, found while reading. The bad ones are in `quarantine/` by now; what
    needs them grows back by running the stage that made them again."""

    def __init__(self, reasons: dict[str, str]):
        """`reasons`: what is wrong, by sha256."""
        super().__init__("; ".join(f"blob {sha256[:12]}… {reason}" for sha256, reason in sorted(reasons.items())))
        self.reasons, self.blobs = dict(reasons), frozenset(reasons)


def view(objects: Objects, cache: Path, tree: Tree, hold: Hold) -> Path:
    """A read-only folder holding the tree's files, there as long as `hold` is, which makes room for what is downloaded.
    Raises BadBlob, and UserError when the cache cannot be written."""
    check_paths(tree)
    folder = cache / "views" / tree.digest
    with clear_errors(cache):
        hold.add(folder.name)
        while not _shows(cache, folder, tree):
            aside = folder.with_name(f".{uuid4().hex}")  # beside it: a read-only folder cannot change its parent
            hold.add(aside.name)
            try:
                _build(objects, cache, aside, tree, hold)
                if not _moved(aside, folder) and not _shows(cache, folder, tree):  # damaged, not just made by another
                    _moved(folder, aside.with_suffix(".damaged"))
            finally:
                hold.came(aside.name, 0)
                remove_folder(aside)
                remove_folder(aside.with_suffix(".damaged"))
        os.utime(folder)
    return folder


def keep(cache: Path, source: Path, file: File, limit: float = inf) -> None:
    """Put a local file that was just hashed into the cache, so that it is not downloaded again, if there is room below
    `limit` bytes. It becomes read-only unless it has to be copied."""
    target = _cached(cache, file.sha256)
    found = source.stat()
    with clear_errors(cache):
        if target.exists() or not make_room(cache, file.size, limit):
            return
        aside = _aside(cache)
        try:
            if found.st_nlink == 1:
                os.link(source, aside)
            else:
                copy_file(source, aside)
        except OSError:
            copy_file(source, aside)
        aside.chmod(found.st_mode & 0o444)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.replace(target)


def bring(objects: Objects, cache: Path, folder: Path, file: File, limit: float) -> None:
    """Have a file of the store stand in a folder on the cache's disk, which may have `limit` bytes. Raises BadBlob."""
    target = folder / file.path
    with clear_errors(cache):
        if intact(cache, target, file):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        wrong = _linked(objects, cache, folder, file)
        if wrong is None:
            with begun(cache, file.sha256) as part, moving("downloaded", file.size) as moved:
                make_room(cache, file.size, limit)
                wrong = _brought(objects, cache, folder, file, part, moved)
    if wrong:
        raise BadBlob({file.sha256: wrong})


def release(cache: Path, file: File) -> None:
    """Remove a blob's copy from the cache unless something shows it."""
    copy = _cached(cache, file.sha256)
    with suppress(FileNotFoundError):
        found = copy.stat()
        if found.st_nlink == 1:
            copy.unlink()
            _record(cache, found).unlink()


def intact(cache: Path, path: Path, file: File, sha256: str | None = None) -> bool:
    """Whether a local file holds exactly that blob. Hashes it unless that was done before, or its `sha256` is known."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    if found.st_size != file.size:
        return False
    record = _record(cache, found)
    if record.exists() and record.read_text() == _seal(file, found):
        return True
    if (sha256 or sha256_file(path)) != file.sha256:
        return False
    if time.time_ns() - found.st_mtime_ns > FRESH:
        _remember(cache, file, found)
    return True


def trust(cache: Path, path: Path, file: File) -> None:
    """Spare `intact` the hashing of a local file that was hashed just now and had not changed when it became read-only.
    Its time stamp may be too young to tell a later change apart: who made it is to have finished with it."""
    with suppress(OSError):  # a full disk: then it is hashed once more
        _remember(cache, file, path.stat())


def _remember(cache: Path, file: File, found: os.stat_result) -> None:
    record = _record(cache, found)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(_seal(file, found))


def _seal(file: File, found: os.stat_result) -> str:
    return f"{file.sha256} {found.st_size} {found.st_mtime_ns}"


def _record(cache: Path, found: os.stat_result) -> Path:
    return cache / "verified" / f"{found.st_ino % 256:02x}" / f"{found.st_dev:x}-{found.st_ino:x}"


def quarantine(objects: Objects, sha256: str) -> None:
    """Move a blob out of the way, for people to look at."""
    objects.move(blob_path(sha256), f"quarantine/{sha256}-{time.time_ns()}")


def sweep(cache: Path, before: float, delete: bool) -> tuple[int, int]:
    """Views that nobody asked for since `before`, and what only they use: how many things and bytes go."""
    folders = idle_views(cache, before)
    links = Counter(found.st_ino for folder in folders for _, found in files_below(folder))
    files = [file for kind in ("blobs", "verified", "tmp") for file in files_below(cache / kind)]
    going = {p: s for p, s in files if s.st_mtime < before and s.st_nlink == 1 + links[s.st_ino]}
    if delete:
        drop_views(cache, before)
        for path in going:
            path.unlink(missing_ok=True)
    begun = sweep_begun(cache, before, delete)
    return len(folders) + len(going) + len(begun), sum(found.st_size for found in going.values()) + sum(begun)


def spread(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """`map` over threads, in order: S3 calls wait, hashing leaves the interpreter free."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, items)


def _shows(cache: Path, folder: Path, tree: Tree) -> bool:
    return folder.is_dir() and all(intact(cache, folder / file.path, file) for file in tree.files)


def _build(objects: Objects, cache: Path, aside: Path, tree: Tree, hold: Hold) -> None:
    """Make a folder that shows the tree: what is on this disk first, which holds it there; then downloads."""
    aside.mkdir(parents=True)
    files = {file.sha256: file for file in reversed(tree.files)}  # a blob that two files share comes once
    for file in tree.files:
        (aside / file.path).parent.mkdir(parents=True, exist_ok=True)
    here = dict(zip(files, spread(lambda f: _linked(objects, cache, aside, f), files.values(), 4), strict=True))
    absent = [file for file in files.values() if here[file.sha256] is None]
    left = sum(file.size for file in absent)

    def brought(file: File) -> str:
        there = nullcontext(parts[file.sha256]) if file.sha256 in parts else begun(cache, file.sha256)
        with there as part:
            return _brought(objects, cache, aside, file, part, moved)

    with ExitStack() as stack, moving("downloaded", left) as moved:
        # What there is to go on with is taken before room is made for it, or it might go for its own sake.
        names = [file.sha256 for file in absent if broke_off(cache, file.sha256)]
        parts = {sha256: stack.enter_context(begun(cache, sha256)) for sha256 in names}
        if absent:
            hold.reserve(aside.name, left)
        for file, wrong in zip(absent, spread(brought, absent, 4), strict=True):
            left -= file.size
            hold.came(aside.name, left)
            here[file.sha256] = wrong
    if bad := {sha256: wrong for sha256, wrong in here.items() if wrong}:
        raise BadBlob(bad)
    for file in tree.files:
        if not (aside / file.path).exists():
            _link(aside / files[file.sha256].path, aside / file.path)
    for place, _, _ in os.walk(aside):
        Path(place).chmod(0o555)


def _linked(objects: Objects, cache: Path, aside: Path, file: File) -> str | None:
    """Show a file that is on this disk: the empty string when that was done, what is wrong with it, or None when it has
    to be brought."""
    stored, copy = objects.local(blob_path(file.sha256)), _cached(cache, file.sha256)
    own = stored is not None and _same_disk(stored, cache)
    source = stored if stored is not None and own else copy
    try:
        if intact(cache, source, file):
            _link(source, aside / file.path)
            used(source)
            return ""
        wrong = _refused(objects, file) if own and source.exists() else "is missing"
    except FileNotFoundError:  # removed at this moment
        wrong = "is missing"
    return wrong if own else None


def fetched(objects: Objects, path: str, part: Path, sha256: str, moved: Moved = nobody) -> bool:
    """Have a local file hold an object with that sha256; it may hold the beginning of it, from a download that broke
    off. Whether it does now. Raises FileNotFoundError."""
    tries = 2  # a download may be damaged on its way
    while tries:
        before = part.stat().st_size if part.exists() else 0
        if (objects.download(path, part, moved) or sha256_file(part)) == sha256:
            return True
        moved(-part.stat().st_size)
        os.truncate(part, 0)
        if before:
            _log.warning("%s: what an earlier download left of %s was damaged; fetching it anew", objects.url, path)
        else:
            tries -= 1
    return False


def _brought(objects: Objects, cache: Path, aside: Path, file: File, part: Path, moved: Moved) -> str:
    """Download a file into the view by way of `part`, and keep it in the cache; or what is wrong with it."""
    target = aside / file.path
    try:
        whole = fetched(objects, blob_path(file.sha256), part, file.sha256, moved)
    except FileNotFoundError:
        return "is missing"
    except OSError:  # a full disk, on which nothing is to stay that was not there before
        part.unlink(missing_ok=True)
        raise
    if not whole:
        return _refused(objects, file)
    part.rename(target)
    target.chmod(0o444)
    intact(cache, target, file, file.sha256)
    _cache(target, _cached(cache, file.sha256))
    return ""


def _cache(source: Path, copy: Path) -> None:
    """Give a verified file its name among the cached blobs, whatever stands there."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    beside = copy.with_name(f"{copy.name}.{uuid4().hex}")
    with suppress(OSError):  # no hard links there: then the view alone has it
        os.link(source, beside)
        beside.replace(copy)


def _refused(objects: Objects, file: File) -> str:
    quarantine(objects, file.sha256)
    return "holds other bytes (moved to quarantine/)"


def _moved(source: Path, target: Path) -> bool:
    try:
        source.rename(target)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def _link(source: Path, target: Path) -> None:
    """Give a blob another name. Raises FileNotFoundError."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, another owner, or too many links
        copy_file(source, target)
        target.chmod(0o444)


def _cached(cache: Path, sha256: str) -> Path:
    return cache / "blobs" / sha256[:2] / sha256


def _aside(cache: Path) -> Path:
    folder = cache / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / uuid4().hex


def _same_disk(stored: Path, cache: Path) -> bool:
    cache.mkdir(parents=True, exist_ok=True)
    return not stored.exists() or stored.stat().st_dev == cache.stat().st_dev
