"""Views: read-only local folders that show an artifact's files, each blob's sha256 checked on the way in.

Layout of the local cache, which may be deleted whenever nothing runs::

    blobs/ab/abcd…      copies of blobs whose store is not a folder on the same disk
    views/<digest>/     one folder a tree, hard-linked from the store or from `blobs/`; `views/.…` is being made
    verified/           which inode was found to hold which blob, so that a model is not hashed at every stage
    tmp/                downloads under way

A file counts as verified while its inode, size and modification time stay what they were when it was hashed; silent
decay of the disk is what `verify --deep` is for.
"""

import errno
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from stages.identity import File, Tree, sha256_file
from stages.manifest import check_paths
from stages.objects import Objects, blob_path, clear_errors
from stages.objects.folder import copy_file

FRESH = 100_000_000
"""Nanoseconds for which a file's modification time is too young to tell a later change apart."""

A = TypeVar("A")
B = TypeVar("B")


class BadBlob(Exception):
    """Blobs that are missing or hold other bytes, found while reading. The bad ones are in `quarantine/` by now; what
    needs them grows back by running the stage that made them again."""

    def __init__(self, reasons: dict[str, str]):
        """`reasons`: what is wrong, by sha256."""
        super().__init__("; ".join(f"blob {sha256[:12]}… {reason}" for sha256, reason in sorted(reasons.items())))
        self.blobs = frozenset(reasons)


def view(objects: Objects, cache: Path, tree: Tree) -> Path:
    """A read-only folder holding the tree's files. Raises BadBlob, and UserError when the cache cannot be written."""
    check_paths(tree)
    folder = cache / "views" / tree.digest
    with clear_errors(cache):
        while not _shows(cache, folder, tree):
            aside = folder.with_name(f".{uuid4().hex}")  # beside it: a read-only folder cannot change its parent
            try:
                _build(aside, tree, _gather(objects, cache, tree))
                if not _moved(aside, folder) and not _shows(cache, folder, tree):  # damaged, not just made by another
                    _moved(folder, aside.with_suffix(".damaged"))
            finally:
                remove_folder(aside)
                remove_folder(aside.with_suffix(".damaged"))
        os.utime(folder)
    return folder


def keep(cache: Path, source: Path, file: File) -> None:
    """Put a local file that was just hashed into the cache, so that it is not downloaded again. It becomes
    read-only unless it has to be copied."""
    target = _cached(cache, file.sha256)
    if target.exists():
        return
    aside = _aside(cache)
    found = source.stat()
    with clear_errors(cache):
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


def intact(cache: Path, path: Path, file: File) -> bool:
    """Whether a local file holds exactly that blob. Hashes it unless that was done before."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    if found.st_size != file.size:
        return False
    record = cache / "verified" / f"{found.st_ino % 256:02x}" / f"{found.st_dev:x}-{found.st_ino:x}"
    seal = f"{file.sha256} {found.st_size} {found.st_mtime_ns}"
    if record.exists() and record.read_text() == seal:
        return True
    if sha256_file(path) != file.sha256:
        return False
    if time.time_ns() - found.st_mtime_ns > FRESH:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(seal)
    return True


def quarantine(objects: Objects, sha256: str) -> None:
    """Move a blob out of the way, for people to look at."""
    objects.move(blob_path(sha256), f"quarantine/{sha256}-{time.time_ns()}")


def sweep(cache: Path, before: float, delete: bool) -> tuple[int, int]:
    """Views that nobody asked for since `before`, and what only they use: how many things and bytes go."""
    folders = [folder for folder in (cache / "views").glob("*") if folder.stat().st_mtime < before]
    links = Counter(path.stat().st_ino for folder in folders for path in folder.rglob("*") if path.is_file())
    files = [path for kind in ("blobs", "verified", "tmp") for path in (cache / kind).rglob("*") if path.is_file()]
    stats = {path: path.stat() for path in files}
    going = {p: s for p, s in stats.items() if s.st_mtime < before and s.st_nlink == 1 + links[s.st_ino]}
    if delete:
        for folder in folders:
            remove_folder(folder)
        for path in going:
            path.unlink(missing_ok=True)
    return len(folders) + len(going), sum(found.st_size for found in going.values())


def remove_folder(folder: Path) -> None:
    """Delete a folder of views, read-only folders included."""
    for place, _, _ in os.walk(folder):
        Path(place).chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


def spread(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """`map` over threads, in order: S3 calls wait, hashing leaves the interpreter free."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, items)


def _shows(cache: Path, folder: Path, tree: Tree) -> bool:
    return folder.is_dir() and all(intact(cache, folder / file.path, file) for file in tree.files)


def _gather(objects: Objects, cache: Path, tree: Tree) -> dict[str, Path]:
    """Local, verified files by sha256."""
    files = {file.sha256: file for file in tree.files}
    found = dict(zip(files, spread(lambda f: _local_blob(objects, cache, f), files.values(), 4), strict=True))
    bad = {sha256: reason for sha256, reason in found.items() if isinstance(reason, str)}
    if bad:
        raise BadBlob(bad)
    return {sha256: path for sha256, path in found.items() if isinstance(path, Path)}


def _local_blob(objects: Objects, cache: Path, file: File) -> Path | str:
    """A local file that holds the blob, or what is wrong with it."""
    stored = objects.local(blob_path(file.sha256))
    if stored is not None and _same_disk(stored, cache):
        if intact(cache, stored, file):
            return stored
        return _refused(objects, file) if stored.exists() else "is missing"
    copy = _cached(cache, file.sha256)
    if intact(cache, copy, file):
        return copy
    for _ in range(2):  # a download may be damaged on its way
        aside = _aside(cache)
        try:
            objects.download(blob_path(file.sha256), aside)
            if intact(cache, aside, file):
                aside.chmod(0o444)
                copy.parent.mkdir(parents=True, exist_ok=True)
                aside.replace(copy)
                return copy
        except FileNotFoundError:
            return "is missing"
        finally:
            aside.unlink(missing_ok=True)
    return _refused(objects, file)


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


def _build(aside: Path, tree: Tree, blobs: dict[str, Path]) -> None:
    aside.mkdir(parents=True)
    for file in tree.files:
        target = aside / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(blobs[file.sha256], target)
        except OSError:  # another disk, another owner, or too many links
            copy_file(blobs[file.sha256], target)
            target.chmod(0o444)
    for place, _, _ in os.walk(aside):
        Path(place).chmod(0o555)


def _cached(cache: Path, sha256: str) -> Path:
    return cache / "blobs" / sha256[:2] / sha256


def _aside(cache: Path) -> Path:
    folder = cache / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / uuid4().hex


def _same_disk(stored: Path, cache: Path) -> bool:
    cache.mkdir(parents=True, exist_ok=True)
    return not stored.exists() or stored.stat().st_dev == cache.stat().st_dev
