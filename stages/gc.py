"""What the store holds for nobody, and whether what it holds is whole.

`collect` keeps whatever a root names: a ref (production, pins and published versions are refs), a run that a ref
names, a run younger than `run_days`. A root names an artifact when its key or digest stands anywhere in the root's
document, so roots need no common form; naming too much keeps too much and harms nobody. What is younger than the grace
stays too: somebody may be about to name it. How old something is, is judged by the store's clock: this machine's may be
wrong.

Manifests go before blobs, and a blob goes only when no manifest that stays lists it and it is still old at that moment.
Every commit makes the blobs it lists young before its manifest stands, so one that comes in meanwhile loses nothing.
An artifact that nobody names may go while a run that just found it is about to read it: then it grows back.
"""

import json
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import uuid4

from stages import views
from stages.checkpoints import sweep_fetching
from stages.errors import UserError
from stages.identity import sha256_file
from stages.manifest import Artifact, BadManifest, decode
from stages.objects import Entry, blob_path, clear_errors, clock_of
from stages.store import STALE, Store

DAY = 24 * 3600.0
GRACE = 2 * STALE
"""Seconds for which nothing goes after it was last written."""
CACHE_DAYS = 14.0
"""Days after which a local view goes that nobody asked for."""
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass(frozen=True)
class Tally:
    """Some objects and their bytes."""

    count: int
    size: int


@dataclass
class Collected:
    """What `collect` found, and removed if `deleted`."""

    deleted: bool
    kept: dict[str, Tally] = field(default_factory=dict)
    """Artifacts that stay, by stage, with the bytes of their blobs (a blob that two stages list counts for both)."""
    swept: dict[str, Tally] = field(default_factory=dict)
    """Artifacts that go, by stage, with the bytes that no kept artifact lists."""
    freed: dict[str, Tally] = field(default_factory=dict)
    """Objects that go, by folder of the store; `unfinished` writes (bytes unknown); and those of the local `cache`."""
    dangling: list[str] = field(default_factory=list)
    """Refs that name nothing this store holds."""


class Problem(NamedTuple):
    """Something that cannot be read back."""

    artifact: str
    """`stage/key`, or empty for a blob that no manifest lists."""
    path: str
    """The artifact's file, or the object's path in the store."""
    reason: str


@dataclass
class Verified:
    """What `verify` looked at and what it found wrong."""

    deep: bool
    artifacts: int
    blobs: Tally
    problems: list[Problem]


class _Manifest(NamedTuple):
    entry: Entry
    artifact: Artifact


def collect(store: Store, *, delete: bool = False, run_days: float = 30.0, grace: float = GRACE) -> Collected:
    """Find what no root names, and remove it if `delete`.

    `grace` is in seconds. Raises UserError when a manifest cannot be read, because its blobs would be taken for
    nobody's.
    """
    now = _now(store, delete)
    old, ancient = now - grace, now - max(run_days * DAY, grace)
    report = Collected(delete)
    found = _manifests(store)
    live = _live(store, found, old, ancient, report.dangling)
    held = _blobs(found[path] for path in live)
    report.kept = _by_stage((found[path].artifact for path in live), without={})
    report.swept = _by_stage((m.artifact for path, m in found.items() if path not in live), without=held)

    def sweep(folder: str, entries: Iterable[Entry], before: float = old) -> None:
        report.freed[folder] = _sweep(store, entries, before, delete)

    for folder in ("actions", "superseded"):
        sweep(folder, (m.entry for path, m in found.items() if path not in live and path.startswith(f"{folder}/")))
    sweep("blobs", (e for e in store.objects.list("blobs/") if e.path.rpartition("/")[2] not in held))
    committed = {m.artifact.key for m in found.values()}
    checkpoints = list(store.objects.list("checkpoints/"))
    sweep(
        "checkpoints",
        (e for e in checkpoints if e.modified < (old if e.path.split("/")[1] in committed else ancient)),
    )
    sweep("locks", store.objects.list("locks/"))
    sweep("quarantine", store.objects.list("quarantine/"), ancient)
    report.freed["unfinished"] = Tally(store.objects.unfinished(old, delete), 0)
    with clear_errors(store.cache):
        unused = time.time() - CACHE_DAYS * DAY
        count, size = views.sweep(store.cache, unused, delete)
        broken_off = sweep_fetching(store.cache, unused, delete)
        report.freed["cache"] = Tally(count + len(broken_off), size + sum(broken_off))
    return report


def verify(store: Store, *, deep: bool = False) -> Verified:
    """Check that every blob a manifest lists is there with its size; `deep` reads every blob, checks its sha256,
    moves bad ones to quarantine/ (their artifacts grow back when they are needed), and has local copies checked
    again when they are next read."""
    blobs = {e.path.rpartition("/")[2]: e.size for e in store.objects.list("blobs/")}
    bad = dict(_rotten(store, blobs)) if deep else {}
    if deep:
        shutil.rmtree(store.cache / "verified", ignore_errors=True)
    problems, listed, artifacts = [], set(), 0
    for stage, key, entry in store.manifests():
        data = store.objects.read(entry.path)
        if data is None:
            continue
        artifacts += 1
        try:
            tree = decode(stage, key, data.data).tree
        except BadManifest as error:
            problems.append(Problem(f"{stage}/{key}", entry.path, str(error)))
            continue
        for file in tree.files:
            listed.add(file.sha256)
            size = blobs.get(file.sha256)
            if size != file.size and (late := store.objects.stat(blob_path(file.sha256))):
                size = blobs[file.sha256] = late.size  # it was committed after all blobs had been listed
            if file.sha256 in bad:
                problems.append(Problem(f"{stage}/{key}", file.path, f"blob {file.sha256} {bad[file.sha256]}"))
            elif size is None:
                problems.append(Problem(f"{stage}/{key}", file.path, f"blob {file.sha256} is missing"))
            elif size != file.size:
                reason = f"blob {file.sha256} has {size} bytes, not {file.size}"
                problems.append(Problem(f"{stage}/{key}", file.path, reason))
    problems += [Problem("", blob_path(sha256), why) for sha256, why in bad.items() if sha256 not in listed]
    return Verified(deep, artifacts, Tally(len(blobs), sum(blobs.values())), problems)


def _now(store: Store, delete: bool) -> float:
    """The time at the store. Who only looks and may not write there takes this machine's for it."""
    try:
        return clock_of(store.objects)
    except UserError:
        if delete:
            raise
        return time.time()


def _manifests(store: Store) -> dict[str, _Manifest]:
    """All manifests, superseded ones too, by path."""

    def read(entry: Entry) -> _Manifest | None:
        found = store.objects.read(entry.path)
        if found is None:
            return None
        stage, key = entry.path.removesuffix(".json").split("/")[1:3]
        try:
            return _Manifest(entry, decode(stage, key, found.data))
        except BadManifest as error:
            raise UserError(
                f"{store.url}: nothing was swept, because {entry.path} cannot be trusted ({error}); "
                "run `regrow verify`, then delete that file"
            ) from error

    entries = [e for folder in ("actions/", "superseded/") for e in store.objects.list(folder)]
    return {m.entry.path: m for m in views.spread(read, entries, 8) if m is not None}


def _live(store: Store, manifests: dict[str, _Manifest], old: float, ancient: float, dangling: list[str]) -> set[str]:
    """Paths of the manifests that stay: named by a root, part of one that is, or young."""
    named: dict[str, list[str]] = defaultdict(list)
    for path, manifest in manifests.items():
        named[manifest.artifact.digest].append(path)
        if path.startswith("actions/"):
            named[manifest.artifact.key].append(path)
    runs = {e.path.removeprefix("runs/").removesuffix(".json"): e for e in store.objects.list("runs/")}
    rooting = {name for name, entry in runs.items() if entry.modified > ancient}
    texts = []
    for name in store.refs():
        ref = store.read_ref(name)
        if ref is None:
            continue
        texts.append(json.dumps(ref.document))
        its_runs = runs.keys() & _strings(ref.document)
        rooting |= its_runs
        if not its_runs and not any(digest in named for digest in _DIGEST.findall(texts[-1])):
            dangling.append(name)
    texts += [json.dumps(store.read_run(name)) for name in sorted(rooting)]
    todo = [path for path, manifest in manifests.items() if manifest.entry.modified >= old]
    todo += [path for text in texts for digest in _DIGEST.findall(text) for path in named.get(digest, ())]
    live: set[str] = set()
    while todo:
        path = todo.pop()
        if path not in live:
            live.add(path)
            todo += [p for part in manifests[path].artifact.parts.values() for p in named.get(part["key"], ())]
    return live


def _strings(value: object) -> set[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        return {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for item in items for text in _strings(item)}


def _blobs(manifests: Iterable[_Manifest]) -> dict[str, int]:
    """Sizes of the blobs that manifests list, by sha256."""
    return {file.sha256: file.size for manifest in manifests for file in manifest.artifact.tree.files}


def _by_stage(artifacts: Iterable[Artifact], without: dict[str, int]) -> dict[str, Tally]:
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, dict[str, int]] = defaultdict(dict)
    for artifact in artifacts:
        counts[artifact.stage] += 1
        sizes[artifact.stage] |= {f.sha256: f.size for f in artifact.tree.files if f.sha256 not in without}
    return {stage: Tally(counts[stage], sum(sizes[stage].values())) for stage in sorted(counts)}


def _sweep(store: Store, entries: Iterable[Entry], before: float, delete: bool) -> Tally:
    """Remove (or only count) those not written since `before`."""

    def drop(entry: Entry) -> bool:
        return store.objects.delete(entry.path, before) if delete else True

    going = [entry for entry in entries if entry.modified < before]
    gone = [entry for entry, went in zip(going, views.spread(drop, going, 8), strict=True) if went]
    return Tally(len(gone), sum(entry.size for entry in gone))


def _rotten(store: Store, blobs: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The blobs whose bytes are not what their name says, moved to quarantine."""

    def holds(sha256: str) -> bool:
        path = store.objects.local(blob_path(sha256))
        copy = store.cache / "tmp" / uuid4().hex
        try:
            if path is None:
                copy.parent.mkdir(parents=True, exist_ok=True)
                store.objects.download(blob_path(sha256), copy)
            return sha256_file(path or copy) == sha256
        except FileNotFoundError:  # swept meanwhile
            return True
        finally:
            copy.unlink(missing_ok=True)

    names = list(blobs)
    for sha256, good in zip(names, views.spread(holds, names, 2), strict=True):
        if not good:
            views.quarantine(store.objects, sha256)
            yield sha256, "holds other bytes (moved to quarantine/)"
