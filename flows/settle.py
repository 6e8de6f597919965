"""After publish: deliver the model and move its production ref, if the gate passed. Done hit or not, and idempotent.

Prefect-free, so that a run with nothing to do can look at the destination in milliseconds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flows.run import Run
from stages.deliver import deliver, delivered, delivery
from stages.identity import Json
from stages.publish import PublishConfig, promote
from stages.store import Ref


@dataclass(frozen=True)
class Outcome:
    """What became of the model."""

    passed: bool
    reasons: list[str]
    """Why the gate passed or did not."""
    to: str
    """Where the model is, or empty when nowhere was asked for or the gate did not pass."""
    arrived: bool
    """Delivered just now, rather than there already."""
    production: Literal["moved", "stands", "elsewhere", "untouched"]
    """`elsewhere`: the production ref names another model, and this run made nothing that would replace it, or
    somebody moved it meanwhile."""


def settle(run: Run) -> Outcome:
    """Deliver and promote the run's published model. Raises UserError when the destination cannot be written."""
    card, weights = run.artifacts["publish"], run.artifacts["merge"]
    config = run.config("publish")
    assert isinstance(config, PublishConfig)
    passed, reasons = bool(card.facts["passed"]), list(card.facts["reasons"])
    if not passed:
        return Outcome(False, reasons, "", False, "untouched")
    tree = delivery(weights.tree, card.tree)
    options = run.runtime.storage_options
    arrived = bool(config.to) and not delivered(config.to, tree, options)
    if arrived:
        deliver(config.to, tree, run.store, private=config.private, options=options)
    model: dict[str, Json] = {
        "model": {"key": weights.key, "digest": weights.digest},
        "card": {"key": card.key, "digest": card.digest},
    }
    return Outcome(True, reasons, config.to, arrived, _promoted(run, model))


def _promoted(run: Run, model: Mapping[str, Json]) -> Literal["moved", "stands", "elsewhere"]:
    ref = run.store.read_ref(f"{run.name}/production")
    if ref is not None and {n: ref.document.get(n) for n in model} == model:
        return "stands"
    if ref is not None and (not run.made or _version(ref) != run.production):
        return "elsewhere"
    moved = promote(run.store, run.name, {**model, "run": run.id}, run.production)
    return "moved" if moved else "elsewhere"


def _version(ref: Ref | None) -> str | None:
    return ref.version if ref else None


def outcome_json(outcome: Outcome) -> str:
    """For machines."""
    return json.dumps(outcome.__dict__)
