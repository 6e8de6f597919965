"""Builds one stage: find it in the store, or run it in a child process and commit what it made.

`build` is the same for every stage, for the flow, for a single ad-hoc stage and for tests::

    built = build(pack.STAGE, config, {"tokens": tokens.tree}, store, runtime)

A mapped stage (fetch, convert, tokenize, evaluate) is built part by part, each part an artifact of its own, and then
listed as one whole: new data costs only itself, and a hit on the whole is one look-up.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.identity import Json, Tree
from stages.jobs import WHOLE, Hooks, Job, Maker
from stages.lease import Lease, lease
from stages.provenance import provenance_of
from stages.runtime import Runtime
from stages.stage import Part, Stage, StageConfig, action_of, merge_facts
from stages.store import Artifact, Store


@dataclass(frozen=True)
class Built:
    """What `build` returns."""

    artifact: Artifact
    hit: bool
    """Found in the store (or made by another run meanwhile), not made here."""
    seconds: float


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
    if stage.resolve and parts is None:
        parts = stage.resolve(config, runtime.cache)
    action = action_of(stage, config, inputs, parts or (), where)
    replace = force or regrow
    if not replace and (found := store.find(stage.name, action.key)):
        return Built(found, True, time.monotonic() - started)
    with lease(store, stage.name, action.key, runtime.lease_seconds, run, hooks.on_wait) as held:
        found = None if force else store.find(stage.name, action.key)
        if found and not (regrow and store.missing(found.tree)):  # made, or grown back, by whoever held the lease
            return Built(found, True, time.monotonic() - started)
        maker = Maker(stage, store, runtime, where or {}, run, hooks, lambda: _stopped(held))
        listed = stage.parts(config, inputs) if parts is None and stage.parts else parts
        if listed is None:
            [artifact] = maker.make([Job(WHOLE, action, config.model_dump(mode="json"), inputs, replace)])
        else:
            made = maker.make_parts(listed, force=force)
            facts = merge_facts([a.facts for a in made.values()])
            artifact = store.commit_whole(
                action, made, facts, provenance_of(stage, config, run, started), replace=replace
            )
    return Built(artifact, False, time.monotonic() - started)


def _stopped(held: Lease) -> str:
    """Why a stage whose lease was lost stops, or empty."""
    return f"stopped at its last save: the lease on this stage was lost, {held.why}" if held.lost.is_set() else ""
