"""Rows in files: local paths, globs and folders, any URL that fsspec can read, or https. One part a file.

Packed files and archives (`stages.sources.unpack`) are unpacked on the way in, and every file is cut into pieces
(`stages.sources.pieces`). A local file is read once, and hashed while it is cut. A remote one is downloaded into the
work folder first, so that an attempt that was killed is gone on with; where only its first rows are wanted, it is read
as far as they reach.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, cast

from stages.errors import UserError
from stages.home import expanded
from stages.identity import Json
from stages.sources import Found, beside, hub, remote, urls
from stages.sources.batches import batches, cut_batches
from stages.sources.digests import digests, refuse_pointers
from stages.sources.pieces import Pieces, cut
from stages.sources.unpack import (
    ARCHIVES,
    KINDS,
    ROWS,
    SUFFIXES,
    Budget,
    clear_errors,
    has_rows,
    hidden,
    left_alone,
    members,
    refuse_splits,
    suffix_of,
    unpacked,
)
from stages.stage import Facts, Work, merge_facts

NEED_SEEKING = (".parquet", ".arrow", ".zip")
"""Files that cannot be read from their beginning to their end."""

SMALL = 256 << 10
"""Bytes that are hashed sooner than handed to a thread."""


def resolve(
    locations: Sequence[str], options: Mapping[str, Json], sha256: str | None, place: str, cache: Path
) -> list[Found]:
    """The files at the locations, in the order given and by name. `place` is the recipe's field, for messages; `cache`
    that of `digests`.

    A file that several locations name counts once. `sha256` is what the one file there must have. Raises UserError for
    what is missing, empty or of no known kind.
    """
    found: dict[str, Found] = {}  # by where links lead
    for location in locations:
        if location.startswith(("http://", "https://")):
            found.setdefault(location, _web(location, options, bool(sha256), place))
        elif "://" in location and not location.startswith("file://"):
            for one in urls.listing(location, options, place):
                found.setdefault(str(one.where["url"]), one)
        else:
            for one in _local(location.removeprefix("file://"), place):
                found.setdefault(str(Path(one.where["path"]).resolve()), one)
    if not found:
        raise UserError(f"{place} is empty: expected a path, a glob, a folder or a URL")
    for one in found.values():
        here = Path(one.where["path"]) if "path" in one.where else None
        check(str(one.where["name"]), here.stat().st_size if here else one.identity["size"], place)
    local = [Path(one.where["path"]) for one in found.values() if "path" in one.where]
    refuse_pointers(local, place)
    hashed = dict(zip(map(str, local), digests(local, cache), strict=True))
    resolved = [_identified(one, hashed) for one in found.values()]
    return _pinned(resolved, sha256, place) if sha256 else resolved


def _identified(one: Found, hashed: Mapping[str, str]) -> Found:
    path = one.where.get("path")
    what = one.identity if path is None else {"size": Path(path).stat().st_size, "sha256": hashed[path]}
    return Found({"suffix": suffix_of(str(one.where["name"])), **what}, one.where)


def _pinned(found: Sequence[Found], sha256: str, place: str) -> list[Found]:
    if len(found) != 1:
        raise UserError(f"{place}: sha256 is that of one file, and there are {len(found)}")
    suffix, size, has = (found[0].identity.get(name) for name in ("suffix", "size", "sha256"))
    if has not in (None, sha256):
        raise UserError(f"{place}: {found[0].where['name']} has the sha256 {has}, and not the one that the recipe says")
    return [Found({"suffix": suffix, "size": size, "sha256": sha256}, found[0].where)]


def _local(location: str, place: str) -> list[Found]:
    """The files at a path. Their digests are looked up later, together."""
    path = expanded(location, place)
    try:
        paths, others = _paths(path, location, place)
    except OSError as error:
        told = f"{error.filename} cannot be read ({error.strerror})"
        raise UserError(f"{place}: {told}: change its owner or mode, or name what can be") from error
    found = [Found({}, {"name": path.name, "path": str(path.absolute())}) for path in paths]
    return beside(found, others)


def _paths(path: Path, location: str, place: str) -> tuple[list[Path], int]:
    """The files there, and how many others a folder has. Raises OSError for a folder that cannot be read."""
    if path.is_dir():
        inside = (p for folder in _folders(path, str(path)) for p in folder.iterdir())
        below = [*_files(inside, lambda p: has_rows(str(p.relative_to(path))), place)]
        refuse_splits([p.as_posix() for p in below], place)
        paths = sorted(p for p in below if has_rows(str(p.relative_to(path))))
        if not paths:
            raise UserError(f"{place}: no file in the folder {location} is one of {', '.join(SUFFIXES)}")
        return paths, left_alone(str(p.relative_to(path)) for p in below)
    if path.exists():
        return [path], 0
    if any(mark in location for mark in "*?["):
        matching = _matching(Path(path.anchor), path.relative_to(path.anchor).parts, str(path))
        shown = (p for p in matching if not hidden(str(p), str(path)))
        paths = sorted(_files(shown, lambda p: bool(suffix_of(p.name)), place))
        if not paths:
            raise UserError(
                f"{place}: nothing matches {location} (looked from {Path.cwd()}; hidden files do not count)"
            )
        return paths, 0
    raise UserError(f"{place}: there is no file {location} (looked from {Path.cwd()})")


def _files(found: Iterable[Path], taken: Callable[[Path], bool], place: str) -> Iterator[Path]:
    """Those that are files. Raises UserError for a link to nothing that would be `taken` if it led to one."""
    for path in found:
        if path.is_file():
            yield path
        elif taken(path) and path.is_symlink() and not path.exists():
            told = f"{path} is a link to {path.readlink()}, which is not there"
            raise UserError(f"{place}: {told}: mend it, or remove it")


def _folders(top: Path, asked: str) -> Iterator[Path]:
    """A folder and those below it, also those that links lead to; each once, so that a link to one above ends."""
    been: set[str] = set()
    for folder, below, _ in os.walk(top, onerror=lambda error: _refuse(error, asked), followlinks=True):
        below.sort()
        if (real := os.path.realpath(folder)) in been:
            below.clear()
            continue
        been.add(real)
        yield Path(folder)


def _matching(top: Path, pattern: Sequence[str], asked: str) -> Iterator[Path]:
    """What a glob finds; Python's own does not follow links where it says `**`, and leaves out what it cannot read."""
    if not pattern:
        yield top
        return
    first, *rest = pattern
    if first == "**":
        found = _folders(top, asked)
    elif any(mark in first for mark in "*?["):
        found = (path for path in _entries(top, asked) if fnmatchcase(path.name, first))
    else:
        found = (path for path in [top / first] if path.exists() or path.is_symlink())
    for path in found:
        yield from _matching(path, rest, asked)


def _entries(folder: Path, asked: str) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        _refuse(error, asked)
        return []


def _refuse(error: OSError, asked: str) -> None:
    """Raise the error of a folder that cannot be read, unless it is none, or is hidden and the path or glob that was
    `asked` for does not look there."""
    if not isinstance(error, NotADirectoryError | FileNotFoundError) and not hidden(str(error.filename), asked):
        raise error


def _web(url: str, options: Mapping[str, Json], pinned: bool, place: str) -> Found:
    from stages.sources import web  # with TLS and HTTP, which a plan over local files does without

    name = web.name_of(url)
    if "*" in name:
        raise UserError(f"{place}: {url} is a web address, where nobody can list files: name each of them")
    check(name, None, place)
    return Found(
        web.look(url, options, pinned, place),
        {"name": name, "url": url, **({"options": dict(options)} if options else {})},
    )


def check(name: str, size: int | None, place: str) -> None:
    """Raises UserError for a file without content, or of no kind that can be read."""
    if not suffix_of(name):
        hint = ': write one {"text": "..."} a line as .jsonl' if name.lower().endswith((".txt", ".md", ".text")) else ""
        raise UserError(f"{place}: {name} is none of {', '.join(SUFFIXES)}{hint}")
    if size == 0:
        raise UserError(f"{place}: {name} is empty")


def bring(found: Mapping[str, Json], where: Mapping[str, Json], pieces: Pieces, work: Work) -> Facts:
    """Write a file's rows as pieces. Raises UserError when it is no longer what was resolved, or is damaged."""
    pieces.name = str(where["name"])
    path = _here(found, where, work, work.folder / "download")
    facts = _cut_file(path, found, pieces, work)
    return merge_facts([{"bytes": found["size"] or path.stat().st_size}, facts, _others(where)])


def bring_first(found: Mapping[str, Json], where: Mapping[str, Json], pieces: Pieces, work: Work) -> Facts:
    """Write the first `first` rows of several files as pieces. Files that are not reached are not read."""
    pieces.left = wanted = int(found["first"])
    several = len(found["files"]) > 1
    for number, (one, place) in enumerate(zip(found["files"], where["files"], strict=True)):
        pieces.name, pieces.file = str(place["name"]), number + 1 if several else None
        if "url" in place and one["suffix"] not in NEED_SEEKING:
            with remote.Remote(pieces.name, _opener(one, place), one["size"]) as stream, clear_errors(pieces.name):
                _cut(cast(BinaryIO, stream), str(one["suffix"]), stream.length, pieces, work)
        else:
            _cut_file(_here(one, place, work, work.folder / f"download-{number}"), one, pieces, work)
        work.tell(wanted - pieces.left, wanted, "rows")
        if pieces.full:
            break
    return merge_facts([{"rows": wanted - pieces.left, "first": wanted}, *map(_others, where["files"])])


def _others(where: Mapping[str, Json]) -> Facts:
    return {"other_files": where["other_files"]} if "other_files" in where else {}


def _here(found: Mapping[str, Json], where: Mapping[str, Json], work: Work, target: Path) -> Path:
    """A local file with the content that was found, as far as that can be told before it is read."""
    if "path" in where:
        return Path(where["path"])
    if "hub" in where:
        return hub.download(found, where)
    size = found["size"]
    remote.download(
        str(where["name"]), _opener(found, where), size, target, lambda done: work.tell(done, size, "bytes")
    )
    return target


def _opener(found: Mapping[str, Json], where: Mapping[str, Json]) -> remote.OpenAt:
    url, options = str(where["url"]), where.get("options", {})
    if url.startswith(("http://", "https://")):
        from stages.sources import web

        return web.opener(url, options, found)
    return urls.opener(url, options, found, str(where["name"]))


def _cut_file(path: Path, found: Mapping[str, Json], pieces: Pieces, work: Work) -> Facts:
    """Cut a local file, and make sure that what was read is what was found."""
    try:
        before = _state(path)
        with path.open("rb") as file, clear_errors(pieces.name):
            if found["suffix"] in NEED_SEEKING:
                facts, digest = _cut(file, str(found["suffix"]), lambda: before[0], pieces, work), None
            else:
                stream = _Hashed(file, lambda done: work.tell(done, found["size"], "bytes"))
                facts = _cut(cast(BinaryIO, stream), str(found["suffix"]), lambda: before[0], pieces, work)
                digest = None if pieces.full else stream.rest()
        same = _state(path) == before
    except OSError as error:
        raise UserError(f"{pieces.name} can no longer be read: {error}") from error
    if "sha256" in found:
        same = same and (digest or digests([path], work.runtime.cache)[0]) == found["sha256"]
    if not same:
        if path.is_relative_to(work.folder):
            path.unlink()  # the next attempt begins anew
        raise UserError(f"{pieces.name} changed while the run was going on: run again")
    return facts


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _cut(file: BinaryIO, suffix: str, size: Callable[[], int], pieces: Pieces, work: Work) -> Facts:
    budget = Budget(pieces.name, size)
    if suffix not in ARCHIVES:
        return _cut_rows(file, suffix, budget, pieces, work)
    facts: dict[str, Json] = {"members": 0, "other_files": 0}
    names: list[str] = []
    for name, member in members(file, suffix, budget):
        names.append(name)
        if member is None:
            facts["other_files"] += 1
            continue
        facts["members"] += 1
        pieces.member = name
        _cut_rows(member, suffix_of(name, ROWS), budget, pieces, work)
        if pieces.full:
            break
    pieces.member = ""
    refuse_splits(names, pieces.name, packed=True)
    if not facts["members"]:
        raise UserError(f"{pieces.name} holds no file of rows: expected {', '.join(ROWS)} in it")
    return facts


def _cut_rows(stream: BinaryIO, suffix: str, budget: Budget, pieces: Pieces, work: Work) -> Facts:
    kind = next(kind for kind in KINDS if suffix.startswith(kind))
    if kind not in (".parquet", ".arrow"):
        cut(unpacked(stream, suffix, budget), kind, pieces)
        return {}
    if not hasattr(stream, "fileno"):  # a member of an archive
        member = work.folder / "member"
        with member.open("wb") as sink:
            shutil.copyfileobj(stream, sink, remote.CHUNK)
        with member.open("rb") as whole:
            rows = cut_batches(batches(whole, kind, pieces), pieces)
        member.unlink()
        return {"rows": rows}
    return {"rows": cut_batches(batches(stream, kind, pieces), pieces)}


class _Hashed:
    """A file that is hashed as it is read, in a thread of its own."""

    def __init__(self, file: BinaryIO, told: Callable[[int], None]) -> None:
        self.file, self.told, self.digest, self.done = file, told, hashlib.sha256(), 0
        self.hasher = ThreadPoolExecutor(1)
        self.hashing: Future[None] | None = None

    def read(self, size: int = remote.CHUNK) -> bytes:
        data = self.file.read(size)
        if self.hashing:
            self.hashing.result()
            self.hashing = None
        if len(data) < SMALL:
            self.digest.update(data)
        else:  # beside the cutting and writing of it
            self.hashing = self.hasher.submit(self.digest.update, data)
        self.done += len(data)
        self.told(self.done)
        return data

    def rest(self) -> str:
        """The digest of the whole file, once what is left of it is read too."""
        while self.read():
            pass
        self.hasher.shutdown()
        return self.digest.hexdigest()
