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
    """The files at the locations, in the order given and by name. `place` is the recipe's field, for messages.

    A file that several locations name counts once. Raises UserError for what is missing, empty or of no known kind.
    """
    local: dict[Path, Path] = {}  # by where links lead
    remote: list[Found] = []
    for location in locations:
        if "://" in location and not location.startswith("file://"):
            remote += (found for found in _remote(location, place) if found not in remote)
        else:
            for path in _local(location.removeprefix("file://"), place):
                local.setdefault(path.resolve(), path)
    if not local and not remote:
        raise UserError(f"{place} is empty: expected a path, a glob, a folder or a URL")
    paths = list(local.values())
    for path in paths:
        _check(path.name, path.stat().st_size, place)
    return [
        *(
            Found(_identity(path.name, sha256=digest, size=path.stat().st_size), {"path": str(path)})
            for path, digest in zip(paths, digests(paths), strict=True)
        ),
        *remote,
    ]


def _local(location: str, place: str) -> list[Path]:
    path = Path(location).expanduser()
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p.name) and not p.name.startswith("."))
        if not paths:
            raise UserError(f"{place}: no file in the folder {location} is one of {', '.join(SUFFIXES)}")
    elif path.exists():
        paths = [path]
    elif any(mark in location for mark in "*?["):
        paths = sorted(p for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file())
        if not paths:
            raise UserError(f"{place}: nothing matches {location} (looked from {Path.cwd()})")
    else:
        raise UserError(f"{place}: there is no file {location} (looked from {Path.cwd()})")
    return [path.absolute() for path in paths]


def _remote(location: str, place: str) -> list[Found]:
    fs, path = filesystem(location, place)
    try:
        if "*" in path or "[" in path:
            infos = fs.glob(path, detail=True)
        elif not _suffix(_name(path)) and fs.isdir(path):
            infos = {name: info for name, info in fs.find(path, detail=True).items() if _suffix(name)}
        else:
            infos = {path: fs.info(path)}
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{place}: cannot read {location}: {error or type(error).__name__}") from error
    files = [info for _, info in sorted(infos.items()) if info["type"] == "file"]
    if not files:
        raise UserError(f"{place}: nothing matches {location}")
    return [_remote_file(fs, info, place) for info in files]


def filesystem(location: str, place: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises UserError for a protocol it does not know."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise UserError(f"{place}: cannot read {location}: {error}") from error
    fs.invalidate_cache()  # its memory of listings outlives this call, and we are here to look
    return fs, path


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].partition("?")[0]


def _remote_file(fs: Any, info: Mapping[str, Any], place: str) -> Found:
    name = _name(info["name"])
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
    try:
        if "path" in where:
            return Path(where["path"]).open("rb")
        fs, path = filesystem(where["url"], found["name"])
        if not version(fs, fs.info(path)).items() <= found.items():
            raise UserError(f"{found['name']} changed while the run was going on: run again")
        return fs.open(path, "rb")
    except OSError as error:
        raise UserError(f"{found['name']} can no longer be read: {error}") from error


def _unpack(path: Path, name: str) -> None:
    packed = path.rename(path.with_name("packed"))
    try:
        with gzip.open(packed) as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{name} is not gzip, or cut short: {error}") from error
    packed.unlink()
