"""Objects: the few primitives the store needs, over a folder, a bucket (S3, Azure, Google) or one process's memory.

A path is relative to the store, with forward slashes. Every primitive is whole or nothing: a reader never sees half an
object, whoever is killed when. `create` and `swap` are atomic between processes and machines; everything that must
have one winner goes through them and is small (manifests, refs, leases). Blobs are content-addressed, so writing one
twice is harmless and `upload` needs no such care.

The parts are written for what fsspec's own exclusive modes do there: on `file://` they race or overwrite, on S3 they
depend on the server's error body, and nowhere is there a swap.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import NamedTuple, Protocol

from stages.errors import UserError
from stages.home import expanded
from stages.transfers import Moved, nobody

__all__ = [
    "Entry",
    "MayNotDelete",
    "Objects",
    "Versioned",
    "blob_path",
    "clear_errors",
    "clock_of",
    "full_disk_told",
    "open_objects",
]


_SERVED = "a folder, s3://bucket/prefix, az://container/prefix, gs://bucket/prefix or memory://name"


class MayNotDelete(UserError):
    """The credentials may write but not delete. What only tidies up goes on without, and leaves it to `regrow gc`."""


class Entry(NamedTuple):
    """One object: its path, its size in bytes, and when it was last written (seconds since the epoch)."""

    path: str
    size: int
    modified: float


class Versioned(NamedTuple):
    """A small object's bytes with the version that `swap` compares."""

    data: bytes
    version: str


class Objects(Protocol):
    """Where a store lives. Errors a person can mend come as UserError; a missing object is never an error."""

    @property
    def url(self) -> str:
        """The store's address, without secrets."""

    def hasty(self) -> "Objects":
        """The same objects, for whom an outage is an error at once."""

    def read(self, path: str) -> Versioned | None:
        """A small object, or None."""

    def create(self, path: str, data: bytes) -> str | None:
        """Write an object that must not exist yet. Return its version, or None if another one stands there."""

    def swap(self, path: str, data: bytes, version: str) -> str | None:
        """Replace the object while it still has that version. Return the new version, or None if it has not."""

    def put(self, path: str, data: bytes) -> None:
        """Write a small object, whatever stands there."""

    def upload(self, source: Path, path: str, sha256: str, moved: Moved = nobody) -> None:
        """Write a local file's bytes, whatever stands there; over a network `moved` hears how many more are there. S3
        is sent only what a broken upload left out. A folder store takes the file itself where it can (hard link) and
        makes it read-only."""

    def touch(self, entry: Entry) -> bool:
        """Make an object look written just now. Return False if it is gone."""

    def download(self, path: str, target: Path, moved: Moved = nobody) -> str | None:
        """Copy an object to a local file; `moved` as in `upload`. Over a network, what the file holds already counts as
        the object's beginning, as a broken download leaves it. Gives the file's sha256 where it was found on the way.
        Raises FileNotFoundError."""

    def stat(self, path: str) -> Entry | None:
        """Size and time of an object, or None."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """All objects under `prefix`, which ends with a slash. For sweeping and history, never for look-ups."""

    def delete(self, path: str, before: float = inf) -> bool:
        """Remove an object that was last written before that time. Return whether it went. (On S3 an object written
        between the look and the removal goes too.) Raises MayNotDelete."""

    def move(self, path: str, target: str) -> None:
        """Give an object another path, if it is there."""

    def local(self, path: str) -> Path | None:
        """Where the object lies (or would lie) on this machine, if it is a file here."""

    def unfinished(self, before: float, remove: bool) -> int:
        """How many interrupted writes nobody went on with since that time; `remove` drops them."""


def blob_path(sha256: str) -> str:
    """Where the blob with that digest lies."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def clock_of(objects: Objects) -> float:
    """What time it is where the objects are (seconds since the epoch), told by one that is written there: always the
    same, as who may write need not have the right to delete. Raises UserError where nothing can be written."""
    objects.put("clock.json", b"1")
    written = objects.stat("clock.json")
    if written is None:
        raise UserError(f"{objects.url}: objects vanish as they are written; is something else deleting there?")
    return written.modified


def open_objects(url: str, options: Mapping[str, str], read_only: bool = False, reached: bool = False) -> Objects:
    """The objects at a URL: a folder (plain path or `file://`), `s3://bucket/prefix`, `az://container/prefix`,
    `gs://bucket/prefix` or `memory://name`. If `read_only` whatever would write there raises UserError.

    `options` are the service's (`OPTIONS` in its file). An outage is an error within seconds, unless the place was
    `reached` before. Raises UserError for a scheme that is not served, and for a
    folder that cannot be made or written.
    """
    if read_only:
        from stages.objects.read_only import ReadOnly

        return ReadOnly(_open(url, options, False, reached))
    return _open(url, options, True, reached)


def _open(url: str, options: Mapping[str, str], made: bool, reached: bool) -> Objects:
    scheme, separator, rest = url.partition("://")
    if not url or (separator and not rest and scheme != "memory"):
        raise UserError(f"store {url!r}: names no place; use {_SERVED}")
    if not separator or scheme == "file":
        from stages.objects.folder import FolderObjects, open_folder

        folder = Path(rest if separator else url)
        return open_folder(folder) if made else FolderObjects(expanded(folder, "store").absolute())
    if scheme == "memory":
        from stages.objects.memory import MemoryObjects

        return MemoryObjects(rest.strip("/"))
    if scheme == "s3":
        from stages.objects.s3 import open_s3

        return open_s3(rest, options, reached)
    if scheme == "az":
        from stages.objects.azure import open_azure

        return open_azure(rest, options, reached)
    if scheme == "gs":
        from stages.objects.gcs import open_gcs

        return open_gcs(rest, options, reached)
    raise UserError(f"store {url}: {scheme}:// is not served; use {_SERVED}")


@contextmanager
def clear_errors(place: Path) -> Iterator[None]:
    """Turn a full disk and missing rights into one line that names the folder."""
    try:
        with full_disk_told(place):
            yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = os.strerror(error.errno)
            raise UserError(
                f"{place}: cannot be written by this user ({reason}); change its owner or mode, or name another "
                "folder (REGROW_STORE, REGROW_CACHE)"
            ) from error
        raise


@contextmanager
def full_disk_told(place: Path) -> Iterator[None]:
    """Turn a full disk into one line that names the folder."""
    try:
        yield
    except Exception as error:  # safetensors has an error of its own, with the system's words in it
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            raise UserError(
                f"{place}: the disk is full; free some space, or name a folder on another disk "
                "(REGROW_STORE, REGROW_CACHE)"
            ) from error
        raise
