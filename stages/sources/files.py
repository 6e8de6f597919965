"""Rows in files: local paths, globs and folders, or any URL that fsspec can read. One part a file."""

import gzip
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.identity import Json
from stages.sources import Found
from stages.sources.digests import digests
from stages.stage import Facts, Work

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".json.gz", ".csv.gz")
"""What convert can read; `.gz` is unpacked on the way in."""

CHUNK = 4 << 20

CONTENT_ETAGS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
"""Stores whose etags two different objects do not share. Elsewhere (http) an etag only means something at its URL."""


def resolve(locations: Sequence[str], place: str) -> list[Found]:
    """The files at the locations, in order of name. `place` is the recipe's field, for messages."""
    found: list[Found] = []
    for location in locations:
        found += _remote(location, place) if "://" in location else _local(location, place)
    if not found:
        raise UserError(f"{place} is empty: expected a path, a glob, a folder or a URL")
    return found


def _local(location: str, place: str) -> list[Found]:
    path = Path(location).expanduser()
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p.name) and not p.name.startswith("."))
        if not paths:
            raise UserError(f"{place}: no file in the folder {location} is one of {', '.join(SUFFIXES)}")
    elif path.exists():
        paths = [path]
    elif any(mark in location for mark in "*?["):
        root = Path(path.anchor) if path.is_absolute() else Path()
        paths = sorted(p for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file())
        if not paths:
            raise UserError(f"{place}: nothing matches {location} (looked from {Path.cwd()})")
    else:
        raise UserError(f"{place}: there is no file {location} (looked from {Path.cwd()})")
    for file in paths:
        _check(file.name, file.stat().st_size, place)
    return [
        Found(_identity(file.name, sha256=digest, size=file.stat().st_size), {"path": str(file.resolve())})
        for file, digest in zip(paths, digests(paths), strict=True)
    ]


def _remote(location: str, place: str) -> list[Found]:
    fs, path = filesystem(location, place)
    try:
        paths = [path] if not fs.isdir(path) else [p for p in fs.find(path) if _suffix(p)]
        if fs.has_magic(path) if hasattr(fs, "has_magic") else any(mark in path for mark in "*?["):
            paths = fs.glob(path)
        infos = [fs.info(p) for p in sorted(paths)]
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{place}: cannot read {location}: {error or type(error).__name__}") from error
    if not infos:
        raise UserError(f"{place}: nothing matches {location}")
    return [_remote_file(fs, info, place) for info in infos]


def filesystem(location: str, place: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises UserError for a protocol it does not know."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise UserError(f"{place}: cannot read {location}: {error}") from error
    return fs, path


def _remote_file(fs: Any, info: Mapping[str, Any], place: str) -> Found:
    name = info["name"].rstrip("/").rpartition("/")[2].partition("?")[0]
    _check(name, info.get("size"), place)
    url = fs.unstrip_protocol(info["name"])
    return Found(_identity(name, size=info.get("size"), **version(fs, info)), {"url": url})


def version(fs: Any, info: Mapping[str, Any]) -> dict[str, Json]:
    """What tells this version of a remote file from another: its etag where it has one."""
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    if etag and protocol in CONTENT_ETAGS:
        return {"etag": str(etag).strip('"')}
    if etag:
        return {"etag": str(etag), "at": hashlib.sha256(info["name"].encode()).hexdigest()}
    return {"version": fs.ukey(info["name"])}


def _identity(name: str, **what: Json) -> dict[str, Json]:
    return {"name": name, "suffix": _suffix(name), **what}


def _suffix(name: str) -> str:
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix)), "")


def _check(name: str, size: int | None, place: str) -> None:
    if not _suffix(name):
        raise UserError(f"{place}: {name} is none of {', '.join(SUFFIXES)}")
    if size == 0:
        raise UserError(f"{place}: {name} is empty")


def bring(found: Mapping[str, Json], where: Mapping[str, Json], output: Path, work: Work) -> Facts:
    """Write `rows.<ext>`. Raises UserError when the file is no longer what was resolved."""
    digest = hashlib.sha256()
    target = output / f"rows{found['suffix'].removesuffix('.gz')}"
    with _open(found, where) as source, target.open("wb") as sink:
        size = 0
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            sink.write(chunk)
            size += len(chunk)
            work.tell(size, found["size"], "bytes")
    if found.get("sha256", digest.hexdigest()) != digest.hexdigest():
        raise UserError(f"{found['name']} changed while the run was going on: run again")
    if found["suffix"].endswith(".gz"):
        _unpack(target, found["name"])
    return {"bytes": size}


def _open(found: Mapping[str, Json], where: Mapping[str, Json]) -> Any:
    if "path" in where:
        return Path(where["path"]).open("rb")
    fs, path = filesystem(where["url"], found["name"])
    if not version(fs, fs.info(path)).items() <= found.items():
        raise UserError(f"{found['name']} changed while the run was going on: run again")
    return fs.open(path, "rb")


def _unpack(path: Path, name: str) -> None:
    packed = path.rename(path.with_name("packed"))
    try:
        with gzip.open(packed) as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{name} is not gzip, or cut short: {error}") from error
    packed.unlink()
