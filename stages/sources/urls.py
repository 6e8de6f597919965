"""Files at any URL that fsspec can read: found by glob or folder, told apart by etag, read with retries."""

import os
from collections.abc import Mapping
from typing import Any

from stages.errors import UserError
from stages.identity import Json, canonical_json, sha256_text
from stages.sources import Found, beside, credentials
from stages.sources.remote import OpenAt, Passing
from stages.sources.unpack import has_rows, hidden, left_alone, refuse_splits

BLOCK = 8 << 20
"""Bytes asked for at once: what a connection that breaks costs at most."""

CONTENT_ETAGS = {"s3", "s3a"}
"""Stores whose etags two different objects do not share. Elsewhere an etag only means something at its URL: Azure's and
Google's are made of times, and what is written in parallel may get the same one."""

PLAIN_GCSFS = ("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
"""Keeps gcsfs from asking by gRPC what kind of bucket it has to do with, which takes a right of its own, does not work
with emulators, and takes seconds to import. Who has a zonal bucket sets it to true."""

VERSIONS = (
    *("sha", "blob_id", "checksum", "md5", "CRC", "generation", "version_id"),
    *("mtime", "modify", "modified", "last_modified", "LastModified", "updated", "created"),
)
"""What file systems without etags say of a file's content, each by a name of its own."""


def filesystem(location: str, options: Mapping[str, Json], place: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises UserError for a protocol it does not know."""
    import fsspec

    opened = credentials.opened(options, place)
    os.environ.setdefault(*PLAIN_GCSFS)
    try:
        fs, path = fsspec.core.url_to_fs(location, **opened)
    except (ImportError, ValueError, TypeError) as error:
        told = credentials.without_secrets(str(error), options)
        raise UserError(f"{place}: cannot read {location}: {told}") from error
    fs.invalidate_cache()  # its memory of listings outlives this call, and we are here to look
    return fs, path


def listing(location: str, options: Mapping[str, Json], place: str) -> list[Found]:
    """The files at a URL, glob or folder by name. In `where`: name, url and options, whose secrets are references.

    Raises UserError when there are none, or when they cannot be listed.
    """
    fs, path = filesystem(location, options, place)
    below: Mapping[str, Any] = {}
    try:
        if any(mark in path for mark in "*?["):
            infos = {name: info for name, info in fs.glob(path, detail=True).items() if not hidden(name, path)}
        elif (info := fs.info(path))["type"] == "directory":  # whatever its name: Spark's are called `rows.parquet`
            below = {name.removeprefix(path): info for name, info in fs.find(path, detail=True).items()}
            infos = {name: info for name, info in below.items() if has_rows(name)}
        else:
            infos = {path: info}
    except Exception as error:  # each of fsspec's file systems has errors of its own
        told = credentials.without_secrets(str(error), options) or type(error).__name__
        raise UserError(f"{place}: cannot read {location}: {told}") from error
    refuse_splits((info["name"] for info in below.values()), place)
    found = [info for _, info in sorted(infos.items()) if info["type"] == "file"]
    if not found:
        raise UserError(f"{place}: nothing matches {location} (hidden files do not count)")
    chain = location.partition("::")
    resolved = [
        Found(
            {"size": info.get("size"), **version(fs, info)},
            {
                "name": info["name"].rpartition("/")[2],
                "url": fs.unstrip_protocol(info["name"]) + "".join(chain[1:]),
                **({"options": dict(options)} if options else {}),
            },
        )
        for info in found
    ]
    return beside(resolved, left_alone(below))


def version(fs: Any, info: Mapping[str, Any]) -> dict[str, Json]:
    """What tells this version of a remote file from another: its etag where it has one."""
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    if info.get("md5Hash"):  # Google's, of the content; an object composed of others has none
        return {"md5": str(info["md5Hash"])}
    etag = info.get("ETag") or info.get("etag")
    if etag and protocol in CONTENT_ETAGS:
        return {"etag": str(etag).strip('"')}
    if etag:
        return {"etag": str(etag), "at": sha256_text(info["name"])}
    told = {name: str(info[name]) for name in VERSIONS if info.get(name) is not None}
    return {"version": sha256_text(canonical_json(told)) if told else fs.ukey(info["name"])}


def opener(url: str, options: Mapping[str, Json], found: Mapping[str, Json], name: str) -> OpenAt:
    """`open_at` for the file that was found. Its version is looked at whenever it is opened, and at its end."""

    def open_at(position: int) -> "_File":
        fs, path = filesystem(url, options, name)
        file = _File(fs, path, found, name, options)
        file.check()
        file.open(position)
        return file

    return open_at


class _File:
    """One open file; whatever its library raises is taken for a broken connection."""

    def __init__(self, fs: Any, path: str, found: Mapping[str, Json], name: str, options: Mapping[str, Json]) -> None:
        self.fs, self.path, self.found, self.name, self.options = fs, path, found, name, options
        self.file: Any = None

    def check(self) -> None:
        info = self._tried(lambda: self.fs.info(self.path))
        now = {"size": info.get("size"), **self._tried(lambda: version(self.fs, info))}
        pinned = "sha256" in self.found  # then the bytes decide
        if not pinned and any(self.found.get(what) != value for what, value in now.items()):
            raise UserError(f"{self.name} changed while the run was going on: run again")

    def open(self, position: int) -> None:
        self.file = self._tried(lambda: self.fs.open(self.path, "rb", block_size=BLOCK))
        if position:
            self._tried(lambda: self.file.seek(position))

    def read(self, size: int) -> bytes:
        data: bytes = self._tried(lambda: self.file.read(size))
        if not data or self.file.tell() == self.found["size"]:
            self.check()
        return data

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _tried(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            told = credentials.without_secrets(str(error), self.options) or type(error).__name__
            if isinstance(error, FileNotFoundError | PermissionError):
                raise UserError(f"{self.name} can no longer be read: {told}") from error
            self.fs.invalidate_cache()
            raise Passing(f"the connection broke: {told}") from error
