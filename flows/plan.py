"""The plan: what would run, and why. Reads manifests only, one look-up a stage; imports neither Prefect nor torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flows import continuing
from flows.graph import select, stage_named
from flows.run import Run
from stages.errors import UserError
from stages.identity import Json
from stages.production import Move
from stages.provenance import made_by
from stages.store import Artifact, Store

State = Literal["cached", "runs", "unknown", "skipped"]


@dataclass(frozen=True)
class Step:
    """One stage of the plan."""

    stage: str
    state: State
    """`unknown`: a stage above it runs first, and if that gives the same bytes this one is still cached."""
    reason: str
    key: str | None = None
    artifact: Artifact | None = None
    drift: str = ""
    """How what would make this artifact now differs from what made it; informs, and decides only with --strict."""
    regrows: bool = False
    """It was made, but the store has lost blobs of it that are needed."""


@dataclass(frozen=True)
class Plan:
    """The steps of all the stages that the recipe has a use for, in order."""

    recipe: str
    run: str
    steps: Sequence[Step] = field(default_factory=list)
    to: str = ""
    """Where the recipe delivers its model; empty: nowhere."""
    standing: Move | None = None
    """What brought the model that production named when the run started."""
    note: str = ""
    """Where the training goes on from, if it does."""

    @property
    def to_run(self) -> list[str]:
        """The stages that run, or may."""
        return [s.stage for s in self.steps if s.state in ("runs", "unknown")]

    def step(self, stage: str) -> Step:
        """The step of a stage."""
        return next(s for s in self.steps if s.stage == stage)


def make_plan(
    run: Run,
    selectors: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: Sequence[str] = (),
    strict: bool = False,
) -> Plan:
    """Plan a run. Fills `run.artifacts` with what is found. Raises UserError for a selected stage whose inputs were
    never made and are not selected either, and for a forced one that is not selected."""
    chosen = _chosen(run, selectors, exclude)
    forced = set(select(force)) if force else set()
    for text in force:
        if not {*select([text])} & {*chosen}:
            raise UserError(f"--force {text}: the run leaves that out; select it too, or take --force away")
    baseline = _baseline(run.store, run.name)
    steps: dict[str, Step] = {}
    for stage in run.stages:
        steps[stage] = _step(run, stage, stage in chosen, stage in forced, strict, baseline, steps)
    for stage in _asked_for(run, chosen):
        if (artifact := steps[stage].artifact) and (reason := _regrows(run.store.missing(artifact.tree))):
            steps[stage] = Step(stage, "runs", reason, steps[stage].key, regrows=True)
    for stage in reversed(run.stages):
        for damaged, reason in _damaged(run, steps[stage]):
            steps[damaged] = Step(damaged, "runs", reason, steps[damaged].key, regrows=True)
    for stage in chosen:
        again = [s for s in run.upstream(stage) if steps[s].regrows or steps[s].state == "unknown"]
        if again and steps[stage].state == "cached":
            steps[stage] = replace(steps[stage], state="unknown", reason=_waits(again))
    for stage in chosen:
        for above in run.upstream(stage):
            if above not in chosen and above not in run.artifacts and steps[stage].state != "cached":
                run.inputs(stage)  # raises, naming +stage
    standing = run.production.now if run.production else None
    made = [steps[s] for s in run.stages]
    return Plan(run.name, run.id, made, run.loaded.recipe.publish.to, standing, _goes_on(run, chosen))


def _goes_on(run: Run, chosen: Sequence[str]) -> str:
    if not run.loaded.recipe.fetch.continuing:
        return ""
    if run.production is None:
        return "nothing is in production yet: training starts from the base model, on all shards"
    if "fetch" not in run.artifacts:
        if "convert" in chosen:  # which asks where the training begins: before a model is fetched in vain
            [model] = [part.config for part in run.parts if part.name == "model"]
            continuing.refuse_another_base(run.store, run.production, model)
        told = f"training goes on from run {run.production.now.run}, on the shards it has not seen"
        return f"{told}; if there are none, nothing is new"
    start, rows = run.began()
    heldout = run.loaded.recipe.fetch.heldout
    used, there = (
        sum(shard.partition("/")[0] not in heldout for shard in tree.folders())
        for tree in (rows, run.artifacts["fetch"].tree.folder("data"))
    )
    place = f"goes on from run {start.run}" if start.weights else "starts from the base model"
    return f"training {place}, on {used} of {there} shards"


def require_writable(run: Run, plan: Plan) -> None:
    """Raise UserError when something would have to be made, and the store is only to be read."""
    if run.runtime.read_only and plan.to_run:
        step = plan.step(plan.to_run[0])
        raise UserError(
            f"{step.stage} would have to run ({step.reason}), and {run.store.url} is used read-only (REGROW_READ_ONLY)"
        )


def _chosen(run: Run, selectors: Sequence[str], exclude: Sequence[str]) -> list[str]:
    selected = select(selectors, exclude)
    chosen = [stage for stage in selected if stage in run.stages]
    if selected and not chosen:
        objective = run.loaded.recipe.train.objective
        raise UserError(f"{', '.join(selected)}: the objective {objective} has no use for it")
    return chosen


def _step(
    run: Run,
    stage: str,
    chosen: bool,
    forced: bool,
    strict: bool,
    baseline: Mapping[str, Any],
    before: Mapping[str, Step],
) -> Step:
    waiting = [s for s in run.upstream(stage) if before[s].state in ("runs", "unknown")]
    if waiting:
        why = _waits(waiting)
        if not chosen:
            return Step(stage, "skipped", f"not selected; {why}")
        return Step(stage, "runs", f"forced; {why}") if forced else Step(stage, "unknown", why)
    action = run.action(stage)
    if action is None:
        return Step(stage, "skipped" if not chosen else "unknown", "what it reads has not been made")
    found = run.store.find(stage, action.key)
    if found:
        drift = _drift(stage, run, found)
        if chosen and (forced or (strict and drift)):
            return Step(stage, "runs", "forced" if forced else drift, action.key, drift=drift)
        run.artifacts[stage] = found
        return Step(
            stage, "cached" if chosen else "skipped", "" if chosen else "not selected", action.key, found, drift
        )
    if not chosen:
        return Step(stage, "skipped", "not selected; not made with these settings", action.key)
    return Step(stage, "runs", _why(stage, action.document, baseline.get(stage)), action.key)


def _waits(above: Sequence[str]) -> str:
    return f"depends on {', '.join(above)}"


def _asked_for(run: Run, chosen: Sequence[str]) -> list[str]:
    """The stages whose artifacts a run is for: the weights, which are delivered, and what no other chosen stage reads.

    None before train: shards are many, and looked at when something reads them.
    """
    read = {above for stage in chosen for above in run.upstream(stage)}
    return [s for s in chosen if s == "merge" or (s in ("train", "evaluate", "publish") and s not in read)]


def _regrows(missing: Sequence[str]) -> str:
    """The reason why an artifact grows back, empty where nothing of it is missing."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"grows back: {missing[0]}{more}" if missing else ""


def _damaged(run: Run, step: Step) -> Iterator[tuple[str, str]]:
    """Stages whose artifacts a running step will read but whose blobs are gone: they grow back."""
    if step.state != "runs" or step.stage == "fetch" or any(s not in run.artifacts for s in run.upstream(step.stage)):
        return
    inputs = run.inputs(step.stage)
    for name, take in run.takes(step.stage).items():
        if reason := _regrows(run.store.missing(inputs[name])):
            yield take.stage, reason


def _baseline(store: Store, name: str) -> Mapping[str, Any]:
    """Each stage as the last finished run of this recipe's name had it: `{stage: {"key", "digest", "action"}}`."""
    ref = store.read_ref(f"{name}/last")
    return ref.document["stages"] if ref else {}


def _why(stage: str, document: Mapping[str, Json], last: Mapping[str, Any] | None) -> str:
    """The reason for a miss: the difference from the last run's action document."""
    if last is None:
        return "never made"
    changes = list(differences(stage, last["action"], document))
    if not changes:
        return "its manifest is gone"
    shown = "; ".join(changes[:3])
    return shown if len(changes) <= 3 else f"{shown}; and {len(changes) - 3} more"


def differences(stage: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """How two action documents of a stage differ, in words: `train.learning_rate 0.0001 → 0.0002`."""
    for name in sorted({*before["inputs"], *after["inputs"]}):
        if before["inputs"].get(name) != after["inputs"].get(name):
            yield f"{name} changed"
    changed = [*_changes(stage, before["config"], after["config"])] if not stage_named(stage).resolve else []
    # Of a plug-in that is named now, or no more, the config says so.
    for name in sorted({*before["version"], *after["version"]}):
        old, new = before["version"].get(name), after["version"].get(name)
        if old != new and not (changed and None in (old, new)):
            yield f"version of {name} {_shown(old)} → {_shown(new)}"
    if stage_named(stage).resolve:
        yield from _part_differences(before["config"], after["config"])
        return
    yield from changed or _unsaid(stage, before["config"], after["config"])


def _changes(place: str, before: Json, after: Json) -> Iterator[str]:
    """A value a line, and a line for a whole mapping that came or went. Absent and null are the same here."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before != after:
            yield f"{place} {_shown(before)} → {_shown(after)}"
        return
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        if name not in before and isinstance(new, dict) and new:
            yield f"{place}.{name} is new"
        elif name not in after and isinstance(old, dict) and old:
            yield f"{place}.{name} is gone"
        else:
            yield from _changes(f"{place}.{name}", old, new)


def _unsaid(stage: str, before: Json, after: Json) -> Iterator[str]:
    """What is unset and was not recorded before, or is not any more: where nothing else differs, the key does by it."""
    old, new = ({*_paths(each, (stage,))} for each in (before, after))
    yield from (f"{'.'.join(path)} is unset, and was not recorded before" for path in sorted(new - old))
    yield from (f"{'.'.join(path)} was unset, and is not recorded any more" for path in sorted(old - new))


def _part_differences(before: Mapping[str, Json], after: Mapping[str, Json]) -> Iterator[str]:
    for name in sorted({*before, *after}):
        if name not in before:
            yield f"{name} is new"
        elif name not in after:
            yield f"{name} is gone"
        elif before[name] != after[name]:
            yield f"{name} changed"


def _paths(value: Json, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _paths(below, (*path, name))
    else:
        yield path


def _shown(value: Json) -> str:
    if value is None:
        return "unset"
    text = f"{value:g}" if isinstance(value, float) else str(value) if value != "" else '""'
    return text if len(text) <= 40 else f"{text[:37]}…"


def drifted(run: Run, stage: str) -> bool:
    """Whether what is there of a stage was made by other code or libraries. Of a stage below one that ran, the plan
    could not say: it is found where that one gave the same bytes again."""
    action = run.action(stage)
    found = run.store.find(stage, action.key) if action else None
    return found is not None and bool(_drift(stage, run, found))


def _drift(stage: str, run: Run, found: Artifact) -> str:
    """What makes this stage now, where it differs from what made the artifact."""
    now = made_by(stage_named(stage), run.config(stage))
    told = []
    libraries = found.provenance.get("libraries", {})
    for name, version in now["libraries"].items():
        if name in libraries and libraries[name] != version:
            told.append(f"{name} {libraries[name]}")
    if found.provenance.get("code") not in (None, now["code"]):
        told.insert(0, "other code")
    return f"made by {', '.join(told)}" if told else ""
