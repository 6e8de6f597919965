"""The artifact store: immutable blobs, one manifest an action, movable refs, run records.

Layout below the store's URL::

    blobs/sha256/ab/abcd…       immutable
    actions/<stage>/<key>.json  the manifest: its appearance is the commit
    superseded/<stage>/<key>/   manifests that a forced run or regrowth replaced
    refs/<name>.json            movable names, compare-and-swap
    runs/<id>.json              what a run used and made
    locks/  checkpoints/        see stages.lease and stages.checkpoints
    quarantine/                 what did not hold the bytes its name says
    format.json                 the layout's version
    clock.json                  written to learn what time it is there

Opening and finding import neither s3fs nor fsspec unless the URL asks for them, and `s3://` seldom does.
"""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from stages import views
from stages.cache import Hold, for_good
from stages.errors import UserError
from stages.identity import Action, File, Json, Tree, join, tree_of
from stages.manifest import Artifact, BadManifest, action_path, check_paths, decode, encode, whole_parts
from stages.objects import Entry, MayNotDelete, Objects, blob_path, clock_of, open_objects
from stages.transfers import Moved, moving
from stages.views import BadBlob, spread

__all__ = ["Artifact", "BadBlob", "Ref", "Store", "open_store"]

FORMAT = 1
"""Version of the layout."""
STALE = 24 * 3600.0
"""Seconds after which a blob that is used again is made young again before a manifest lists it. Half of gc's grace."""

COUNTED_ON = 3600.0
"""Seconds after which the store is asked again what time it is."""
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""The clock that nobody sets; on Linux it also counts while the machine sleeps."""

_log = logging.getLogger(__name__)


class Ref(NamedTuple):
    """What a movable name points to, and the version that `swap_ref` compares."""

    document: dict[str, Json]
    version: str


class _Asked(NamedTuple):
    """What time it was at the store, and by the clock that nobody sets, when it was asked."""

    at: float
    told: float


def open_store(
    url: str,
    cache: Path,
    storage_options: Mapping[str, str] | None = None,
    *,
    cache_limit: float = math.inf,
    read_only: bool = False,
    reached: bool = False,
) -> "Store":
    """The store at a folder or URL, founded there if there is none yet; `cache` is a local folder for views, in which
    copies of what the store holds may have `cache_limit` bytes (see `stages.cache`).

    `storage_options` and `reached` are those of `stages.objects.open_objects`. Raises UserError when the place cannot
    be reached, read or founded, when its server ignores conditional writes, and, if `read_only`, when there is no
    store.
    """
    objects = open_objects(url, storage_options or {}, read_only, reached)
    marker = objects.read("format.json")
    if marker is None and read_only:
        raise UserError(f"{objects.url}: there is no store here, and read-only none is founded (REGROW_READ_ONLY)")
    if marker is None:
        _check_conditions(objects)
        objects.create("format.json", json.dumps({"format": FORMAT}).encode())
    elif _parsed(objects, "format.json", marker.data).get("format") != FORMAT:
        raise UserError(
            f"{objects.url}: this store was made by another version of regrow (format.json); upgrade regrow"
        )
    return Store(objects, cache.absolute(), cache_limit)


def _check_conditions(objects: Objects) -> None:
    """Some S3 servers accept conditional writes and ignore the condition: two writers would both win."""
    probe = f"locks/probe-{uuid4().hex}.json"
    objects.create(probe, b"1")
    refused = objects.create(probe, b"2") is None and objects.swap(probe, b"3", '"no such version"') is None
    with suppress(MayNotDelete):  # gc takes it
        objects.delete(probe)
    if not refused:
        raise UserError(
            f"{objects.url}: this server ignores conditional writes (If-None-Match, If-Match), so two runs could "
            "overwrite each other; use AWS S3, SeaweedFS, MinIO, or a folder"
        )


@dataclass(frozen=True)
class Store:
    """Artifacts by action. Safe for any number of threads, processes and machines at once."""

    objects: Objects
    cache: Path
    cache_limit: float = math.inf
    """Bytes that local copies of what it holds may have."""
    warn: Callable[[str], None] = _log.warning
    """Told in one line why a manifest was not trusted."""

    @property
    def url(self) -> str:
        """The store's address, without secrets."""
        return self.objects.url

    def hasty(self) -> "Store":
        """The same store, for whom an outage is an error at once instead of something to wait for."""
        return replace(self, objects=self.objects.hasty())

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact of an action, by one look-up. Blobs are trusted to be there (see `missing` and `view`); a
        manifest that does not add up is quarantined and counts as absent."""
        return self._found(stage, key)[0]

    def recall(self, stage: str, key: str, digest: str) -> Artifact | None:
        """The artifact of an action as it was when it had that digest, also where another one has replaced it since."""
        found = self.find(stage, key)
        if found is not None and found.digest == digest:
            return found
        old = self.objects.read(_superseded(stage, key, digest))
        return None if old is None else decode(stage, key, old.data)

    def renew(self, stage: str, key: str, digest: str) -> list[str]:
        """Make what `recall` finds look written just now, manifest and blobs, for whoever is about to name it: a gc
        under way, which knows only the names that stood when it began, leaves it alone. What of it is gone already, as
        `missing`."""
        for path in (action_path(stage, key), _superseded(stage, key, digest)):
            if there := self.objects.stat(path):
                self.objects.touch(there)
        found = self.recall(stage, key, digest)
        return [f"{stage} {key[:12]}"] if found is None else self.missing(found.tree, younger_than=STALE)

    def commit(
        self,
        action: Action,
        folder: Path,
        facts: Mapping[str, Json],
        provenance: Mapping[str, Json],
        *,
        replace: bool = False,
    ) -> Artifact:
        """Store a folder's files as what the action made; return the artifact that stands afterwards.

        If somebody else committed first, theirs is returned and ours forgotten, unless blobs of it are gone or
        `replace` is set (a forced run, regrowth): then the old manifest moves to `superseded/`. The folder is used
        up: its files may become the store's own (hard links) and turn read-only. Raises UserError for files that
        cannot be stored.
        """
        if not replace and (winner := self.find(action.stage, action.key)) is not None:
            if not self._lacking(winner.tree):
                return winner
            replace = True
        try:
            changed = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
            tree = tree_of(folder)
            check_paths(tree)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f"{action.stage}: {error}") from error
        artifact = Artifact(action.document, action.key, tree, dict(facts), dict(provenance), {})
        data = encode(artifact)
        sources = {file.sha256: (file, folder / file.path) for file in tree.files}
        self._settle(sources, changed)
        artifact, ours = self._publish(artifact, data, replace)
        if ours:
            self._settle(sources, changed)  # somebody may have deleted a blob just before the manifest stood
            if self.objects.local("") is None:
                for file, source in sources.values():
                    views.keep(self.cache, source, file, self.cache_limit)
        return artifact

    def commit_whole(
        self,
        action: Action,
        parts: Mapping[str, Artifact],
        facts: Mapping[str, Json],
        provenance: Mapping[str, Json],
        *,
        replace: bool = False,
    ) -> Artifact:
        """Store an artifact made of others: their files under their names. No bytes move. Raises BadBlob when a
        part's blob is gone; the part has to grow back first."""
        tree = join(part.tree.under(name) for name, part in parts.items())
        check_paths(tree)
        bad = self._lacking(tree, younger_than=STALE)
        if bad:
            raise BadBlob(bad)
        artifact = Artifact(action.document, action.key, tree, dict(facts), dict(provenance), whole_parts(parts))
        return self._publish(artifact, encode(artifact), replace)[0]

    def missing(self, tree: Tree, younger_than: float = math.inf) -> list[str]:
        """What of a tree could not be read: one line a file whose blob is gone or has another size. Blobs older than
        `younger_than` seconds are made young on the way."""
        bad = self._lacking(tree, younger_than)
        return [
            f"{file.path}: blob {file.sha256[:12]}… {bad[file.sha256]}" for file in tree.files if file.sha256 in bad
        ]

    def view(self, tree: Tree, hold: Hold | None = None) -> Path:
        """A read-only local folder of the tree, every blob's sha256 verified. Raises BadBlob after moving what is bad
        to quarantine/. The folder is shared: never write to it, never delete it. It stays until `hold` is closed, or
        without one until this process ends."""
        return views.view(self.objects, self.cache, tree, hold or for_good(self.cache, self.cache_limit))

    def hold(self) -> Hold:
        """For views that are needed no longer than a block runs."""
        return Hold(self.cache, self.cache_limit)

    def manifests(self) -> Iterator[tuple[str, str, Entry]]:
        """(stage, key, entry) of every manifest, by listing: for gc and reports."""
        for entry in self.objects.list("actions/"):
            _, stage, name = entry.path.split("/")
            yield stage, name.removesuffix(".json"), entry

    def read_ref(self, name: str) -> Ref | None:
        """What a movable name (`support-bot/production`) points to, or None."""
        path = _named("refs", name)
        found = self.objects.read(path)
        return None if found is None else Ref(_parsed(self.objects, path, found.data), found.version)

    def swap_ref(self, name: str, expected: str | None, new: Mapping[str, Json]) -> bool:
        """Point a name elsewhere, only if it still has the version `expected` (None: only if it does not exist).

        Every sha256 in the document that is an action's key or an artifact's digest keeps that artifact from gc.
        """
        path, data = _named("refs", name), _dump(new)
        version = self.objects.create(path, data) if expected is None else self.objects.swap(path, data, expected)
        return version is not None

    def refs(self) -> Iterator[str]:
        """All names, sorted."""
        for entry in sorted(self.objects.list("refs/")):
            yield entry.path.removeprefix("refs/").removesuffix(".json")

    def write_run(self, run_id: str, document: Mapping[str, Json]) -> None:
        """Record what a run uses and makes: first when it starts, again as it goes on. Roots like a ref."""
        self.objects.put(_named("runs", run_id), _dump(document))

    def read_run(self, run_id: str) -> dict[str, Json] | None:
        """A run's record, or None."""
        path = _named("runs", run_id)
        found = self.objects.read(path)
        return None if found is None else _parsed(self.objects, path, found.data)

    def runs(self) -> Iterator[tuple[str, dict[str, Json]]]:
        """(id, record) of every run, the one written last first. Records are read some at a time, as asked for."""
        entries = sorted(self.objects.list("runs/"), key=lambda e: (e.modified, e.path), reverse=True)
        for some in (entries[start : start + 32] for start in range(0, len(entries), 32)):
            for entry, found in zip(some, self._spread(lambda e: self.objects.read(e.path), some, 16), strict=True):
                if found is not None:
                    yield (
                        entry.path.removeprefix("runs/").removesuffix(".json"),
                        _parsed(self.objects, entry.path, found.data),
                    )

    def _found(self, stage: str, key: str) -> tuple[Artifact | None, str]:
        path = action_path(stage, key)
        found = self.objects.read(path)
        if found is None:
            return None, ""
        try:
            return decode(stage, key, found.data), found.version
        except BadManifest as error:
            self.objects.move(path, f"quarantine/{stage}-{key}-{time.time_ns()}.json")
            self.warn(f"{self.url}: the manifest {path} was moved to quarantine/: {error}")
            return None, ""

    def _publish(self, artifact: Artifact, data: bytes, replace: bool) -> tuple[Artifact, bool]:
        """Create the manifest, or adopt or replace the one that stands. Returns what stands, and whether it is ours."""
        stage, key = artifact.stage, artifact.key
        path = action_path(stage, key)
        while True:
            standing, version = self._found(stage, key)
            if standing is None:
                if self.objects.create(path, data) is not None:
                    return artifact, True
            elif not replace:
                return standing, False
            else:
                old = encode(standing)
                self.objects.create(_superseded(stage, key, standing.digest), old)
                if self.objects.swap(path, data, version) is not None:
                    return artifact, True

    def _settle(self, sources: Mapping[str, tuple[File, Path]], changed: Mapping[Path, int]) -> None:
        """Write the blobs that are not there, until a look finds every one there with its size, and young. `changed`
        tells when the sources had been changed, in nanoseconds, before they were hashed."""
        tree = Tree(tuple(file for file, _ in sources.values()))

        def put(sha256: str, moved: Moved) -> None:
            file, source = sources[sha256]
            found = source.stat()
            if found.st_size != file.size:
                raise UserError(f"{source}: changed while it was being stored; run the stage again")
            self.objects.upload(source, blob_path(sha256), sha256, moved)
            stored = self.objects.local(blob_path(sha256))
            with suppress(FileNotFoundError):  # it vanished already: the next look finds that
                if stored is not None and stored.samefile(source) and found.st_mtime_ns == changed.get(source):
                    views.trust(self.cache, source, file)

        for _ in range(5):
            lacking = self._lacking(tree, younger_than=STALE)
            if not lacking:
                return
            with moving("uploaded", sum(sources[sha256][0].size for sha256 in lacking)) as moved:
                list(spread(partial(put, moved=moved), lacking, 4))
        raise UserError(f"{self.url}: files vanish as fast as they are written; is something else deleting there?")

    def _lacking(self, tree: Tree, younger_than: float = math.inf) -> dict[str, str]:
        """What is wrong with the tree's blobs, as far as presence and sizes tell, by sha256; else as `missing`."""
        files = {file.sha256: file for file in tree.files}
        oldest = self._now() - younger_than if younger_than < math.inf else -math.inf

        def wrong(file: File) -> str:
            there = self.objects.stat(blob_path(file.sha256))
            if there is None:
                return "is missing"
            if there.size != file.size:
                return f"has {there.size} bytes, not {file.size}"
            return "" if there.modified > oldest or self.objects.touch(there) else "is missing"

        reasons = zip(files, self._spread(wrong, files.values(), 16), strict=True)
        return {sha256: reason for sha256, reason in reasons if reason}

    def _now(self) -> float:
        """The time at the store, as this machine's clock may be wrong: asked again after `COUNTED_ON` seconds, as that
        one may be set too, and counted on in between. Seconds since the epoch."""
        if time.clock_gettime(_STEADY) - self._asked.at > COUNTED_ON:
            vars(self).pop("_asked", None)
        asked = self._asked
        return asked.told + time.clock_gettime(_STEADY) - asked.at

    @cached_property
    def _asked(self) -> _Asked:
        return _Asked(time.clock_gettime(_STEADY), clock_of(self.objects))

    def _spread(self, function: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterable[Any]:
        return map(function, items) if self.objects.local("") is not None else spread(function, items, threads)


def _named(kind: str, name: str) -> str:
    if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", step) for step in name.split("/")):
        raise UserError(f"{kind[:-1]} name {name!r}: use letters, digits, '.', '_' and '-', in steps divided by '/'")
    return f"{kind}/{name}.json"


def _superseded(stage: str, key: str, digest: str) -> str:
    """Where a manifest lies that another one has replaced."""
    return f"superseded/{stage}/{key}/{digest}.json"


def _dump(document: Mapping[str, Json]) -> bytes:
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def _parsed(objects: Objects, path: str, data: bytes) -> dict[str, Json]:
    """A document that the store wrote. Raises UserError for one that was damaged since."""
    try:
        document = json.loads(data)
    except ValueError:  # no UTF-8, too
        document = None
    if not isinstance(document, dict):
        raise UserError(
            f"{objects.url}: {path} is damaged: {len(data)} bytes that are no JSON document. Put a copy of it in its "
            "place, or delete it: what only it said is lost then"
        )
    return document
