"""Makes artifacts of one stage: a job is one of them, a child process works through several, each committed at once."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import IO, Any

from stages import child, streams
from stages.cache import Hold
from stages.child import Task, run_in_child
from stages.identity import Action, Json, Tree
from stages.mirror import Mirror
from stages.objects import clear_errors
from stages.provenance import provenance_of
from stages.runtime import Runtime
from stages.stage import Facts, Part, Stage, part_action
from stages.store import Artifact, Store
from stages.views import spread

LOOKUPS = 16
"""Parts looked up at once: a look-up on S3 is mostly waiting."""

PORTION_PARTS = 256
PORTION_BYTES = 4 << 30
"""Parts, and bytes of their inputs, that one child works through: views and locks of these are held at once."""

OVER = "stopped because another part failed, or the run was interrupted"
"""Why a part's work ends that nothing is wrong with."""

WHOLE = ""
"""The task name of a stage that is not mapped."""


@dataclass(frozen=True)
class Hooks:
    """How the outside follows a build."""

    on_event: Callable[[child.Event], None] = lambda event: None
    on_line: Callable[[str], None] = lambda line: None
    on_wait: Callable[[str], None] = lambda message: None


@dataclass(frozen=True)
class Job:
    """One artifact to make."""

    name: str
    action: Action
    config: Mapping[str, Json]
    inputs: Mapping[str, Tree]
    replace: bool
    where: Mapping[str, Json] | None = None


@dataclass(frozen=True)
class Maker:
    """Runs jobs of one stage in child processes and commits each as it finishes."""

    stage: Stage[Any]
    store: Store
    runtime: Runtime
    where: Mapping[str, Json]
    run: str
    hooks: Hooks
    should_stop: Callable[[], str]
    """Why the work is to stop, or empty."""

    def make_parts(self, parts: Sequence[Part], *, force: bool) -> dict[str, Artifact]:
        """The parts' artifacts by name, in order: found ones as they are, the others made."""
        assert self.stage.part is not None
        made: dict[str, Artifact] = {}
        jobs: list[Job] = []
        actions = [part_action(self.stage, part) for part in parts]
        for part, action, found in zip(parts, actions, spread(self._whole, actions, LOOKUPS), strict=True):
            if found and not force:
                made[part.name] = found
            else:
                jobs.append(Job(part.name, action, dict(part.config), part.inputs, force, part.where))
        # Two parts may be one action, for two shards with the same rows: it is done once.
        twins, jobs = jobs, list({job.action.key: job for job in jobs}.values())
        workers = 1 if self.stage.exclusive else self.runtime.workers
        shares = [jobs[n::workers] for n in range(min(workers, len(jobs)))]
        groups = shares if self.stage.exclusive else [group for share in shares for group in _portions(share)]
        if workers > 1 and len(groups) > 1:
            results = _make_at_once(self, groups, workers)
        else:
            results = [a for group in groups for a in self.make(group)]
        by_key = {artifact.key: artifact for artifact in results}
        made.update({job.name: by_key[job.action.key] for job in twins})
        return {part.name: made[part.name] for part in parts}

    def _whole(self, action: Action) -> Artifact | None:
        """A part's artifact, unless one of its blobs is gone."""
        found = self.store.find(self.stage.name, action.key)
        return None if found is None or self.store.missing(found.tree) else found

    def make(self, jobs: Sequence[Job]) -> list[Artifact]:
        """Run jobs one after another in one child; return their artifacts in order."""
        artifacts: dict[str, Artifact] = {}
        started = time.monotonic()
        with (
            _workplaces(self.runtime.cache, self.stage.name, jobs, self.hooks.on_wait) as (folders, waited),
            self.store.hold() as hold,
        ):
            for job in (job for job in jobs if job.name in waited and not job.replace):
                if found := self._whole(job.action):  # made by whom was waited for
                    artifacts[job.name] = found
            left = [job for job in jobs if job.name not in artifacts]
            tasks = [
                Task(
                    job.name,
                    dict(job.config),
                    {name: str(path) for name, path in self._folders(job, folders[job.name], hold).items()},
                    str(folders[job.name] / "output"),
                    str(folders[job.name]),
                    {**self.where, **(job.where or {})},
                )
                for job in left
            ]
            by_name = {job.name: job for job in left}
            alone = left[0] if len(left) == 1 else None
            mirror = alone and Mirror(self.store, alone.action.key, folders[alone.name], self.hooks.on_wait)
            if mirror:
                mirror.restore()

            def on_event(event: child.Event) -> None:
                nonlocal started
                if event["event"] == "task":
                    job = by_name[event["name"]]
                    config = (self.stage.part or self.stage.config).model_validate(job.config)
                    provenance = provenance_of(self.stage, config, self.run, started)
                    output = folders[job.name] / "output"
                    facts: Facts = event["facts"]
                    artifact = self.store.commit(job.action, output, facts, provenance, replace=job.replace)
                    artifacts[job.name] = artifact
                    started = time.monotonic()
                elif event["event"] == "tell" and mirror and "checkpoint" in event["metrics"]:
                    mirror.save(int(event["done"]), str(event["metrics"]["checkpoint"]))
                self.hooks.on_event(event)

            try:
                if tasks:
                    run_in_child(
                        self.stage.home,
                        tasks,
                        self.runtime.model_copy(update={"store": self.store.url, "cache": self.store.cache}).model_dump(
                            mode="json"
                        ),
                        on_event,
                        self.hooks.on_line,
                        self.should_stop,
                        self.runtime.silence_seconds,
                        self.runtime.grace_seconds,
                    )
            finally:
                if mirror:
                    mirror.settle(wait=not self.should_stop())
            if mirror:
                mirror.drop()
        return [artifacts[job.name] for job in jobs]

    def _folders(self, job: Job, work: Path, hold: Hold) -> dict[str, Path]:
        """Where a job finds its inputs."""
        streamed = {name: tree for name, tree in job.inputs.items() if name in self.stage.streamed}
        viewed = {name: self.store.view(tree, hold) for name, tree in job.inputs.items() if name not in streamed}
        return viewed | streams.prepare(work, streamed)


def _make_at_once(maker: Maker, groups: Sequence[Sequence[Job]], workers: int) -> list[Artifact]:
    """Groups of jobs in children side by side. Once one fails, or whoever waits is interrupted, the others end too."""
    over = Event()
    stoppable = replace(maker, should_stop=lambda: maker.should_stop() or (OVER if over.is_set() else ""))
    with ThreadPoolExecutor(workers) as pool:
        made = [pool.submit(stoppable.make, group) for group in groups]
        try:
            done, _ = wait(made, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [artifact for future in made for artifact in future.result()]


def _portions(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs for one child after another: what is open and on the local disk at once does not grow with the data."""
    portion: list[Job] = []
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


@contextmanager
def _workplaces(
    cache_folder: Path, stage: str, jobs: Sequence[Job], on_wait: Callable[[str], None]
) -> Iterator[tuple[dict[str, Path], set[str]]]:
    """A folder a job that outlives failed attempts, with an empty `output`, removed when all went well; and the names
    of the jobs that somebody else was at work on.

    A file lock per folder keeps two processes of this machine apart even when a lease was lost, and where two runs
    share a part. All take them in the order of the keys, so that no two wait for each other.
    """
    folders: dict[str, Path] = {}
    waited: set[str] = set()
    locks = []

    def wait(job: Job) -> None:
        if job.name not in waited:
            on_wait(f"waiting for another run on this machine, which is at work on {stage} {job.name}".rstrip())
            waited.add(job.name)

    try:
        for job in sorted(jobs, key=lambda job: job.action.key):
            folder = cache_folder / "work" / stage / job.action.key
            with clear_errors(cache_folder):
                locks.append(_locked(folder, partial(wait, job)))
                shutil.rmtree(folder / "output", ignore_errors=True)
                (folder / "output").mkdir()
            folders[job.name] = folder
        yield folders, waited
        for folder in folders.values():
            _remove(folder)
    finally:
        for lock in locks:
            lock.close()


def _locked(folder: Path, wait: Callable[[], None]) -> IO[str]:
    """The folder's lock, once nobody else has it; `wait` is called before waiting. Who had it may have removed the
    folder with the lock in it: then what was waited for keeps nobody out, and all begins anew."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        with ExitStack() as stack, suppress(FileNotFoundError):
            lock = stack.enter_context((folder / "lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat()):
                stack.pop_all()
                return lock


def _remove(folder: Path) -> None:
    """Remove a folder whose lock is held, and the lock at last: from then on it is somebody else's, who may be there
    before the folder is gone."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "lock":
                path.unlink()
        (folder / "lock").unlink()
        folder.rmdir()
