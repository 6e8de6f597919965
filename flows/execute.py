"""Executes one stage of a run: find it, or mend what it reads and build it. No Prefect in here.

A blob that is missing or fails its digest on the way in is not the end: it has been quarantined, the stage that made
it grows back, and the reading stage goes on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from flows.graph import stage_named
from flows.run import Run
from flows.throughput import last_facts, slower
from stages.build import Built, build
from stages.child import ChildFailed, ChildRefused, Event
from stages.errors import UserError
from stages.identity import Tree
from stages.jobs import Hooks
from stages.stage import Part
from stages.store import BadBlob
from stages.transfers import watching

ATTEMPTS = 3
"""How often a stage's inputs may turn out damaged before the store itself is called broken."""

LOG_TAIL = 20
"""Lines of a failed stage's log that the error shows."""


@dataclass(frozen=True)
class Follower:
    """Who wants to see a run as it happens: the terminal, the dashboard."""

    started: Callable[[Run, str], None] = lambda run, stage: None
    event: Callable[[Run, str, Event], None] = lambda run, stage, event: None
    line: Callable[[Run, str, str], None] = lambda run, stage, line: None
    note: Callable[[Run, str, str], None] = lambda run, stage, message: None
    finished: Callable[[Run, str, Built], None] = lambda run, stage, built: None


_followers: list[Follower] = []


@contextmanager
def following(follower: Follower) -> Iterator[None]:
    """Show every stage executed in this process to `follower`."""
    _followers.append(follower)
    try:
        yield
    finally:
        _followers.remove(follower)


class StageFailed(RuntimeError):
    """A stage's code failed: which, why, and where its log is."""


@dataclass
class _Log:
    """A stage's printed lines, to a file and to the followers."""

    run: Run
    stage: str
    tail: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.run.runtime.cache / "logs" / self.run.id / f"{self.stage}.log"

    def line(self, line: str) -> None:
        with suppress(OSError):  # a full disk: what the line says about it is told all the same
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"{line}\n")
        self.tail = [*self.tail[-LOG_TAIL + 1 :], line]
        for follower in _followers:
            follower.line(self.run, self.stage, line)


def execute(run: Run, stage: str, *, force: bool = False, regrow: bool = False) -> Built:
    """Find or make a stage's artifact and enter it into the run; `regrow` makes it again where blobs of it are gone.
    Raises UserError and StageFailed."""
    for follower in _followers:
        follower.started(run, stage)
    built = _execute(run, stage, force=force, regrow=regrow)
    for follower in _followers:
        follower.finished(run, stage, built)
    return built


def _execute(run: Run, stage: str, *, force: bool, regrow: bool) -> Built:
    log = _Log(run, stage)

    def note(message: str) -> None:
        for follower in _followers:
            follower.note(run, stage, message)

    def on_event(event: Event) -> None:
        if said := event.get("metrics", {}).get("note"):
            note(said)
        for follower in _followers:
            follower.event(run, stage, event)

    def transferred(what: str, done: int, total: int) -> None:
        unit = f"MB {what}"
        on_event({"event": "tell", "done": done // 10**6, "total": total // 10**6, "unit": unit, "metrics": {}})

    hooks = Hooks(on_event, log.line, note)
    with watching(transferred):
        return _attempts(run, stage, log, hooks, note, force=force, regrow=regrow)


def _attempts(
    run: Run, stage: str, log: _Log, hooks: Hooks, note: Callable[[str], None], *, force: bool, regrow: bool
) -> Built:
    """Look for the artifact, mend what it is made of, make it; again when its inputs turn out damaged."""
    declared = stage_named(stage)
    for _ in range(ATTEMPTS):
        inputs = run.inputs(stage)
        action = run.action(stage)
        assert action is not None
        if not (force or regrow) and (found := run.store.find(stage, action.key)):
            run.artifacts[stage] = found
            return Built(found, True, 0.0)
        for name, take in run.takes(stage).items():
            if missing := run.store.missing(inputs[name]):
                note(f"{take.stage} grows back: {missing[0]}")
                _execute(run, take.stage, force=False, regrow=True)
                inputs = run.inputs(stage)
        if stage == "evaluate":
            run.refuse_lost_rival()
        try:
            built = build(
                declared,
                run.config(stage),
                inputs,
                run.store,
                run.runtime,
                parts=_parts(run, stage, inputs),
                where=run.where(stage),
                force=force,
                regrow=regrow,
                run=run.id,
                hooks=hooks,
            )
        except BadBlob as error:
            note(str(error))
            continue
        except ChildRefused as error:
            raise UserError(str(error)) from None
        except ChildFailed as error:
            tail = "\n".join(f"    {line}" for line in log.tail)
            raise StageFailed(f"{stage} failed: {error}\n{tail}\n  the whole log: {log.path}") from None
        run.artifacts[stage] = built.artifact
        if not built.hit:
            run.made.add(stage)
            if stage == "train" and (said := slower(last_facts(run.store, run.name), built.artifact.facts)):
                note(said)
        return replace(built)
    raise StageFailed(f"{stage}: what it reads was damaged {ATTEMPTS} times in a row; run `regrow verify --deep`")


def _parts(run: Run, stage: str, inputs: Mapping[str, Tree]) -> Sequence[Part] | None:
    """The parts of a stage where the run knows more of them than the stage: what fetch's sources resolved to, and what
    convert's messages call the file that a shard came from."""
    if stage == "fetch":
        return run.parts
    if stage != "convert":
        return None
    called = {
        part.name.removeprefix("data/"): {"name": name, "files": [one["name"] for one in part.where.get("files", ())]}
        for part in run.parts
        if (name := part.where.get("name")) is not None
    }
    listed = stage_named(stage).parts
    assert listed is not None
    return [
        replace(part, where=where) if (where := called.get("/".join(part.name.split("/")[:2]))) else part
        for part in listed(run.config(stage), inputs)
    ]
