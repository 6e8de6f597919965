"""Objects in this process's memory (`memory://name`), for tests: fsspec's memory file system behind a lock."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import inf
from pathlib import Path
from threading import RLock
from typing import Any

from stages.objects import Entry, Versioned
from stages.transfers import Moved, nobody

_LOCK = RLock()


@dataclass(frozen=True)
class MemoryObjects:
    """See `Objects`. A version is the sha256 of the bytes."""

    name: str

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        return fsspec.filesystem("memory")

    def hasty(self) -> "MemoryObjects":
        return self

    @property
    def url(self) -> str:
        return f"memory://{self.name}"

    def local(self, path: str) -> None:
        return None

    def read(self, path: str) -> Versioned | None:
        with _LOCK:
            if not self._fs.isfile(self._path(path)):
                return None
            data: bytes = self._fs.cat_file(self._path(path))
        return Versioned(data, sha256(data).hexdigest())

    def create(self, path: str, data: bytes) -> str | None:
        with _LOCK:
            if self.read(path) is not None:
                return None
            self.put(path, data)
        return sha256(data).hexdigest()

    def swap(self, path: str, data: bytes, version: str) -> str | None:
        with _LOCK:
            found = self.read(path)
            if found is None or found.version != version:
                return None
            self.put(path, data)
        return sha256(data).hexdigest()

    def put(self, path: str, data: bytes) -> None:
        with _LOCK:
            self._fs.pipe_file(self._path(path), data)

    def upload(self, source: Path, path: str, sha256: str, moved: Moved = nobody) -> None:
        self.put(path, source.read_bytes())

    def touch(self, entry: Entry) -> bool:
        with _LOCK:
            found = self.read(entry.path)
            if found is not None:
                self.put(entry.path, found.data)
        return found is not None

    def download(self, path: str, target: Path, moved: Moved = nobody) -> None:
        found = self.read(path)
        if found is None:
            raise FileNotFoundError(path)
        target.write_bytes(found.data)

    def stat(self, path: str) -> Entry | None:
        with _LOCK:
            if not self._fs.isfile(self._path(path)):
                return None
            size = self._fs.size(self._path(path))
            return Entry(path, size, self._fs.modified(self._path(path)).timestamp())

    def list(self, prefix: str) -> Iterator[Entry]:
        with _LOCK:
            paths = [path.removeprefix(self._path("")) for path in self._fs.find(self._path(prefix))]
        for path in sorted(paths):
            entry = self.stat(path)
            if entry is not None:
                yield entry

    def delete(self, path: str, before: float = inf) -> bool:
        with _LOCK:
            found = self.stat(path)
            if found is None or found.modified >= before:
                return False
            self._fs.rm_file(self._path(path))
            return True

    def move(self, path: str, target: str) -> None:
        with _LOCK:
            found = self.read(path)
            if found is not None:
                self.put(target, found.data)
                self.delete(path)

    def unfinished(self, before: float, remove: bool) -> int:
        return 0

    def _path(self, path: str) -> str:
        return f"/{self.name}/{path}" if self.name else f"/{path}"
