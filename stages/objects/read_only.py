"""Objects that are only read: whatever would write raises one UserError that says so."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import NoReturn

from stages.errors import UserError
from stages.objects import Entry, Objects, Versioned
from stages.transfers import Moved, nobody


@dataclass(frozen=True)
class ReadOnly:
    """See `Objects`."""

    objects: Objects

    def hasty(self) -> "ReadOnly":
        return ReadOnly(self.objects.hasty())

    @property
    def url(self) -> str:
        return self.objects.url

    def read(self, path: str) -> Versioned | None:
        return self.objects.read(path)

    def create(self, path: str, data: bytes) -> str | None:
        self._refuse(f"writing {path}")

    def swap(self, path: str, data: bytes, version: str) -> str | None:
        self._refuse(f"writing {path}")

    def put(self, path: str, data: bytes) -> None:
        self._refuse(f"writing {path}")

    def upload(self, source: Path, path: str, sha256: str, moved: Moved = nobody) -> None:
        self._refuse(f"writing {path}")

    def touch(self, entry: Entry) -> bool:
        self._refuse(f"renewing {entry.path}")

    def download(self, path: str, target: Path, moved: Moved = nobody) -> str | None:
        return self.objects.download(path, target, moved)

    def stat(self, path: str) -> Entry | None:
        return self.objects.stat(path)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self.objects.list(prefix)

    def delete(self, path: str, before: float = inf) -> bool:
        self._refuse(f"deleting {path}")

    def move(self, path: str, target: str) -> None:
        self._refuse(f"moving {path}, which is damaged, to {target.split('/')[0]}/")

    def local(self, path: str) -> Path | None:
        return self.objects.local(path)

    def unfinished(self, before: float, remove: bool) -> int:
        if remove:
            self._refuse("deleting unfinished writes")
        return self.objects.unfinished(before, remove)

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.url}: is used read-only (REGROW_READ_ONLY), which rules out {what}")
