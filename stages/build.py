"""Builds one stage: find it in the store, or run it in a child process and commit what it made.

`build` is the same for every stage, for the flow, for a single ad-hoc stage and for tests::

    built = build(pack.STAGE, config, {"tokens": tokens.tree}, store, runtime)

A mapped stage (fetch, convert, tokenize, evaluate) is built part by part, each part an artifact of its own, and then
listed as one whole: new data costs only itself, and a hit on the whole is one look-up.
"""

import fcntl
import hashlib
import importlib.metadata
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.checkpoints import drop_checkpoints, fetch_checkpoint, latest_checkpoint, save_checkpoint
from stages.child import Event, Task, run_in_child
from stages.identity import Action, Json, Tree
from stages.lease import lease
from stages.runtime import Runtime
from stages.stage import Facts, Part, Stage, StageConfig, merge_facts
from stages.store import Artifact, BadBlob, Store
from stages.views import spread

LOOKUPS = 16
"""Parts looked up at once: a look-up on S3 is mostly waiting."""

PORTION_PARTS = 256
PORTION_BYTES = 4 << 30
"""Parts, and bytes of their inputs, that one child works through: views and locks of these are held at once."""

WHOLE = ""
"""The task name of a stage that is not mapped."""


@dataclass(frozen=True)
class Built:
    """What `build` returns."""

    artifact: Artifact
    hit: bool
    """Found in the store (or made by another run meanwhile), not made here."""
    seconds: float


@dataclass(frozen=True)
class Hooks:
    """How the outside follows a build."""

    on_event: Callable[[Event], None] = lambda event: None
    on_line: Callable[[str], None] = lambda line: None
    on_wait: Callable[[str], None] = lambda message: None


def version_of(stage: Stage[Any], config: StageConfig) -> dict[str, int]:
    """The versions that enter the key: the stage's own, and one a plug-in the config uses."""
    return {stage.name: stage.version, **(stage.plugins(config) if stage.plugins else {})}


def action_of(
    stage: Stage[Any],
    config: StageConfig,
    inputs: Mapping[str, Tree],
    parts: Sequence[Part] = (),
    where: Mapping[str, Json] | None = None,
) -> Action:
    """The action of a whole stage. `parts` are needed only where the stage resolves: they are its identity; `where`
    only for the names in `Stage.named`."""
    document = {p.name: dict(p.config) for p in parts} if stage.resolves else stage.identity(config)
    document |= {name: (where or {}).get(name) for name in sorted(stage.named)}
    return Action(stage.name, version_of(stage, config), document, {n: t.digest for n, t in inputs.items()})


def part_action(stage: Stage[Any], part: Part) -> Action:
    """The action of one part of a mapped stage."""
    assert stage.part is not None
    config = stage.part.model_validate(part.config)
    return Action(
        stage.name,
        version_of(stage, config),
        config.model_dump(mode="json"),
        {n: t.digest for n, t in part.inputs.items()},
    )


def build(
    stage: Stage[Any],
    config: StageConfig,
    inputs: Mapping[str, Tree],
    store: Store,
    runtime: Runtime,
    *,
    parts: Sequence[Part] | None = None,
    where: Mapping[str, Json] | None = None,
    force: bool = False,
    regrow: bool = False,
    run: str = "",
    hooks: Hooks | None = None,
) -> Built:
    """Find or make one stage's artifact.

    `parts` hands in what fetch resolved, so that a resumed run uses its record. `force` makes everything anew and
    replaces the manifest; `regrow` does so only where a blob is missing or bad. Raises BadBlob when an input turns
    out damaged (it is quarantined by then), UserError for the user's mistakes, ChildFailed for the stage's.
    """
    started = time.monotonic()
    hooks = hooks or Hooks()
    if stage.resolves and parts is None:
        assert stage.parts is not None
        parts = stage.parts(config, inputs)
    action = action_of(stage, config, inputs, parts or (), where)
    replace = force or regrow
    if not replace and (found := store.find(stage.name, action.key)):
        return Built(found, True, time.monotonic() - started)
    with lease(store, stage.name, action.key, runtime.lease_seconds, run, hooks.on_wait) as held:
        if not replace and (found := store.find(stage.name, action.key)):
            return Built(found, True, time.monotonic() - started)
        maker = _Maker(stage, store, runtime, where or {}, run, hooks, held.lost.is_set)
        if stage.parts is None:
            [artifact] = maker.make([_Job(WHOLE, action, config.model_dump(mode="json"), inputs, replace)])
        else:
            listed = parts if parts is not None else stage.parts(config, inputs)
            made = maker.make_parts(listed, force=force)
            facts = merge_facts([a.facts for a in made.values()])
            artifact = store.commit_whole(
                action, made, facts, _provenance(stage, config, run, started), replace=replace
            )
    return Built(artifact, False, time.monotonic() - started)


@dataclass(frozen=True)
class _Job:
    name: str
    action: Action
    config: Mapping[str, Json]
    inputs: Mapping[str, Tree]
    replace: bool
    where: Mapping[str, Json] | None = None


@dataclass(frozen=True)
class _Maker:
    """Runs jobs of one stage in child processes and commits each as it finishes."""

    stage: Stage[Any]
    store: Store
    runtime: Runtime
    where: Mapping[str, Json]
    run: str
    hooks: Hooks
    should_stop: Callable[[], bool]

    def make_parts(self, parts: Sequence[Part], *, force: bool) -> dict[str, Artifact]:
        """The parts' artifacts by name, in order: found ones as they are, the others made."""
        assert self.stage.part is not None
        made: dict[str, Artifact] = {}
        jobs: list[_Job] = []
        actions = [part_action(self.stage, part) for part in parts]
        for part, action, found in zip(parts, actions, spread(self._whole, actions, LOOKUPS), strict=True):
            if found and not force:
                made[part.name] = found
            else:
                jobs.append(_Job(part.name, action, dict(part.config), part.inputs, force, part.where))
        # Two parts may be one action, for two shards with the same rows: it is done once.
        twins, jobs = jobs, list({job.action.key: job for job in jobs}.values())
        workers = 1 if self.stage.exclusive else self.runtime.workers
        shares = [jobs[n::workers] for n in range(min(workers, len(jobs)))]
        groups = shares if self.stage.exclusive else [group for share in shares for group in _portions(share)]
        if workers > 1 and len(groups) > 1:
            with ThreadPoolExecutor(workers) as pool:
                results = [a for group in pool.map(self.make, groups) for a in group]
        else:
            results = [a for group in groups for a in self.make(group)]
        by_key = {artifact.key: artifact for artifact in results}
        made.update({job.name: by_key[job.action.key] for job in twins})
        return {part.name: made[part.name] for part in parts}

    def _whole(self, action: Action) -> Artifact | None:
        """A part's artifact, unless one of its blobs is gone."""
        found = self.store.find(self.stage.name, action.key)
        return None if found is None or self.store.missing(found.tree) else found

    def make(self, jobs: Sequence[_Job]) -> list[Artifact]:
        """Run jobs one after another in one child; return their artifacts in order."""
        artifacts: dict[str, Artifact] = {}
        started = time.monotonic()
        with _workplaces(self.runtime.cache, self.stage.name, jobs) as folders:
            tasks = [
                Task(
                    job.name,
                    dict(job.config),
                    {name: str(self.store.view(tree)) for name, tree in job.inputs.items()},
                    str(folders[job.name] / "output"),
                    str(folders[job.name]),
                    {**self.where, **(job.where or {})},
                )
                for job in jobs
            ]
            by_name = {job.name: job for job in jobs}
            alone = jobs[0] if len(jobs) == 1 else None
            mirror = alone and _Mirror(self.store, alone.action.key, folders[alone.name], self.hooks.on_wait)
            if mirror:
                mirror.restore()

            def on_event(event: Event) -> None:
                nonlocal started
                if event["event"] == "task":
                    job = by_name[event["name"]]
                    config = (self.stage.part or self.stage.config).model_validate(job.config)
                    provenance = _provenance(self.stage, config, self.run, started)
                    output = folders[job.name] / "output"
                    facts: Facts = event["facts"]
                    artifact = self.store.commit(job.action, output, facts, provenance, replace=job.replace)
                    artifacts[job.name] = artifact
                    started = time.monotonic()
                elif event["event"] == "tell" and mirror and "checkpoint" in event["metrics"]:
                    mirror.save(int(event["done"]), str(event["metrics"]["checkpoint"]))
                self.hooks.on_event(event)

            try:
                run_in_child(
                    self.stage.home,
                    tasks,
                    self.runtime.model_dump(mode="json"),
                    on_event,
                    self.hooks.on_line,
                    self.should_stop,
                    self.runtime.silence_seconds,
                    self.runtime.grace_seconds,
                )
            finally:
                if mirror:
                    mirror.settle()
            if mirror:
                mirror.drop()
        return [artifacts[job.name] for job in jobs]


def _portions(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Jobs for one child after another: what is open and on the local disk at once does not grow with the data."""
    portion: list[_Job] = []
    held: dict[str, int] = {}
    for job in jobs:
        own = {tree.digest: tree.size for tree in job.inputs.values() if tree.digest not in held}
        if portion and (len(portion) == PORTION_PARTS or sum((held | own).values()) > PORTION_BYTES):
            yield portion
            portion, held = [], {}
            own = {tree.digest: tree.size for tree in job.inputs.values()}
        portion.append(job)
        held |= own
    if portion:
        yield portion


class _Mirror:
    """Copies a stage's local checkpoints to the store while it goes on working, and back before it starts.

    A copy that fails costs that copy: the stage goes on, and its local checkpoint stays. Where saves come faster than
    the store takes them, those in between are left out.
    """

    def __init__(self, store: Store, key: str, folder: Path, note: Callable[[str], None]) -> None:
        self.store, self.key, self.folder, self.note = store, key, folder / "checkpoints", note
        self.attempt = uuid.uuid4().hex[:12]
        self.pool = ThreadPoolExecutor(1)
        self.newest = -1

    def restore(self) -> None:
        """Fetch the store's newest complete checkpoint unless this machine has one at least as new."""
        local = max((int(p.name) for p in self.folder.glob("*") if p.name.isdigit()), default=-1)
        while (newest := latest_checkpoint(self.store, self.key)) is not None and newest.step > local:
            with suppress(BadBlob):  # it has been retired by then, and the next one is asked for
                fetch_checkpoint(self.store, newest, self.folder / str(newest.step))
                return

    def save(self, step: int, name: str) -> None:
        """Have one checkpoint folder uploaded, in the background."""
        self.newest = step
        self.pool.submit(self._upload, step, self.folder / name)

    def _upload(self, step: int, folder: Path) -> None:
        if step < self.newest:
            return
        try:
            save_checkpoint(self.store, self.key, self.attempt, step, folder)
        except Exception as error:  # of whatever kind a store and its network raise
            if step == self.newest:  # an older one may have been removed meanwhile
                self.note(f"checkpoint {step} is on this machine only, it was not copied to the store: {error}")

    def settle(self) -> None:
        """Return when nothing is being uploaded."""
        self.pool.shutdown(wait=True)

    def drop(self) -> None:
        """The artifact is committed: its checkpoints have done their work."""
        drop_checkpoints(self.store, self.key)


@contextmanager
def _workplaces(cache_folder: Path, stage: str, jobs: Sequence[_Job]) -> Iterator[dict[str, Path]]:
    """A folder a job that outlives failed attempts, with an empty `output`, removed when all went well.

    A file lock per folder keeps two processes of this machine apart even when a lease was lost.
    """
    folders: dict[str, Path] = {}
    locks = []
    try:
        for job in jobs:
            folder = cache_folder / "work" / stage / job.action.key
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
            locks.append(lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            shutil.rmtree(folder / "output", ignore_errors=True)
            (folder / "output").mkdir()
            folders[job.name] = folder
        yield folders
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        for lock in locks:
            lock.close()


def _provenance(stage: Stage[Any], config: StageConfig, run: str, started: float) -> dict[str, Json]:
    """What made an artifact: recorded beside it, never part of its key."""
    return {
        "run": run,
        "host": platform.node(),
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - started, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **made_by(stage, config),
    }


def made_by(stage: Stage[Any], config: StageConfig) -> dict[str, Json]:
    """The code and libraries that would make this stage now: `plan` compares them with what made the artifact."""
    modules = [stage.home, *(plugin_module(p) for p in (stage.plugins(config) if stage.plugins else {}))]
    return {
        "code": _code_digest(tuple(modules)),
        "libraries": {name: _library_version(name) for name in stage.libraries},
    }


def plugin_module(plugin: str) -> str:
    """`format:alpaca` is the module `stages.formats.alpaca`."""
    kind, _, name = plugin.partition(":")
    return f"stages.{kind}s.{name}"


@cache
def _code_digest(modules: tuple[str, ...]) -> str:
    """Of the files of `modules` and of what they import of ours, as far as their import lines tell."""
    found: dict[str, bytes] = {}
    for module in modules:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None, module
        origin = Path(spec.origin)
        root = origin.parents[module.count(".") + (origin.name == "__init__.py")]
        own = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
        _follow([path.relative_to(root) for path in own], root, found)
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + b"\0" + found[name])
    return digest.hexdigest()[:16]


_IMPORT = re.compile(rb"^ *from ((?:stages|packing)[\w.]*) import \(?([^()\n]*)", re.M)

_FOUNDATION = frozenset(
    f"stages/{name}.py"
    for name in ("build", "checkpoints", "child", "errors", "gc", "identity", "lease", "manifest", "runtime", "stage")
) | {"stages/store.py", "stages/views.py"}
"""What every stage stands on and what cannot change an artifact's bytes."""


def _follow(paths: Sequence[Path], root: Path, found: dict[str, bytes]) -> None:
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        if path.as_posix() in found or path.as_posix() in _FOUNDATION or not (root / path).is_file():
            continue
        found[path.as_posix()] = text = (root / path).read_bytes()
        for base, names in _IMPORT.findall(text):
            folder = Path(*base.decode().split("."))
            waiting += [folder.with_suffix(".py"), folder / "__init__.py"]
            waiting += [folder / f"{name.split()[0]}.py" for name in names.decode().split(",") if name.strip()]


@cache
def _library_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
