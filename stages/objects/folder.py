"""Objects in a local folder: written aside, synced, and linked into place.

`os.link` is what makes `create` atomic, a lock file (`flock`, released by the kernel when its holder dies) is what
makes `swap` atomic. Files of blobs are read-only and may be hard-linked by views.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from math import inf
from pathlib import Path
from uuid import uuid4

from stages.errors import UserError
from stages.home import expanded
from stages.objects import Entry, Versioned, clear_errors
from stages.transfers import Moved, nobody


def open_folder(folder: Path) -> "FolderObjects":
    """The objects in a folder, made if need be. Raises UserError where it cannot be made or written."""
    root = expanded(folder, "store").absolute()
    try:
        with clear_errors(root):
            (root / "tmp").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{root}: the store must be a folder, but a file stands there or above it") from error
    except OSError as error:
        raise UserError(f"{root}: no folder can be made there ({error.strerror}); set REGROW_STORE") from error
    for place in (root, root / "tmp"):
        if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise UserError(f"{place}: cannot be written by this user; change its owner or mode, or set REGROW_STORE")
    return FolderObjects(root)


@dataclass(frozen=True)
class FolderObjects:
    """See `Objects`. A version is the sha256 of the bytes."""

    root: Path

    def hasty(self) -> "FolderObjects":
        return self

    @property
    def url(self) -> str:
        return str(self.root)

    def local(self, path: str) -> Path:
        return self.root / path

    def read(self, path: str) -> Versioned | None:
        try:
            data = (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Versioned(data, sha256(data).hexdigest())

    def create(self, path: str, data: bytes) -> str | None:
        with clear_errors(self.root), self._written_aside(data) as aside:
            try:
                self._link(aside, self.root / path)
            except FileExistsError:
                return None
        return sha256(data).hexdigest()

    def swap(self, path: str, data: bytes, version: str) -> str | None:
        with clear_errors(self.root), self._locked():
            found = self.read(path)
            if found is None or found.version != version:
                return None
            with self._written_aside(data) as aside:
                aside.replace(self.root / path)
                _sync(self.root / path)
        return sha256(data).hexdigest()

    def put(self, path: str, data: bytes) -> None:
        with clear_errors(self.root), self._locked(), self._written_aside(data) as aside:
            self._replace(aside, self.root / path)

    def upload(self, source: Path, path: str, sha256: str, moved: Moved = nobody) -> None:
        with clear_errors(self.root), self._aside_path() as aside:
            if not _taken(source, aside):
                copy_file(source, aside)
                aside.chmod(source.stat().st_mode & 0o444)
            os.utime(aside)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            with self._locked():
                self._replace(aside, self.root / path)

    def touch(self, entry: Entry) -> bool:
        place = self.root / entry.path
        try:
            with clear_errors(self.root), self._locked():
                try:
                    os.utime(place)
                except PermissionError:  # another user's file: replace it by a copy of our own
                    with self._aside_path() as aside:
                        copy_file(place, aside)
                        aside.chmod(place.stat().st_mode & 0o444)
                        self._replace(aside, place)
        except FileNotFoundError:
            return False
        return True

    def download(self, path: str, target: Path, moved: Moved = nobody) -> None:
        copy_file(self.root / path, target, anew=True)

    def stat(self, path: str) -> Entry | None:
        try:
            found = (self.root / path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(path, found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

    def list(self, prefix: str) -> Iterator[Entry]:
        for folder, _, names in os.walk(self.root / prefix):
            for name in sorted(names):
                entry = self.stat(Path(folder, name).relative_to(self.root).as_posix())
                if entry is not None:
                    yield entry

    def delete(self, path: str, before: float = inf) -> bool:
        with clear_errors(self.root), self._locked():
            found = self.stat(path)
            if found is None or found.modified >= before:
                return False
            (self.root / path).unlink()
            return True

    def move(self, path: str, target: str) -> None:
        with clear_errors(self.root), self._locked(), suppress(FileNotFoundError):
            if (self.root / path).exists():
                self._replace(self.root / path, self.root / target)

    def unfinished(self, before: float, remove: bool) -> int:
        found = [entry for entry in self.list("tmp/") if entry.modified < before]
        if remove:
            for entry in found:
                self.delete(entry.path, before)
        return len(found)

    @contextmanager
    def _aside_path(self) -> Iterator[Path]:
        aside = self.root / "tmp" / uuid4().hex
        try:
            yield aside
        finally:
            aside.unlink(missing_ok=True)

    @contextmanager
    def _written_aside(self, data: bytes) -> Iterator[Path]:
        with self._aside_path() as aside:
            with aside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield aside

    def _link(self, aside: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(aside, target)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP):
                raise UserError(f"{self.root}: this file system has no hard links, which a store needs") from error
            raise
        _sync(target)

    def _replace(self, aside: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.replace(target)
        _sync(target)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.root / "swap.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def copy_file(source: Path, target: Path, anew: bool = False) -> None:
    """Copy bytes to a new file, or `anew` to one that may be there, sharing them on disk where the file system can
    (reflink)."""
    if hasattr(os, "copy_file_range"):
        with source.open("rb") as reader, target.open("wb" if anew else "xb") as writer:
            left = os.fstat(reader.fileno()).st_size
            try:
                while left > 0 and (done := os.copy_file_range(reader.fileno(), writer.fileno(), left)):
                    left -= done
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            if left == 0:
                return
    shutil.copyfile(source, target)


def _taken(source: Path, aside: Path) -> bool:
    """Link our own file to `aside` and make it read-only. Not if it has another name: somebody may write there."""
    found = source.stat()
    if found.st_nlink != 1 or found.st_uid != os.geteuid():
        return False
    try:
        os.link(source, aside)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP):
            return False
        raise
    aside.chmod(found.st_mode & 0o444)
    return True


def _sync(path: Path) -> None:
    """Make a name that was just given survive a power cut."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
