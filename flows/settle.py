"""After publish: move the production ref to the model and deliver it, if the gate passed. Done hit or not, idempotent.

The ref moves first: it has one winner, and a destination that could not be written then is looked at again by the next
run. What does not stand in production is not delivered. Prefect-free, so that a run with nothing to do can look at the
destination in milliseconds.
"""

import json
import logging
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Literal

from flows.delivering import Place, bring, bring_standing
from flows.run import Run
from stages.errors import UserError
from stages.production import Name, promote
from stages.production import production as standing_in
from stages.publish import PublishConfig
from stages.store import Artifact, BadBlob

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of the model."""

    passed: bool
    reasons: list[str]
    """Why the gate passed or did not."""
    to: str
    """Where the model is, or empty when nowhere was asked for or it does not stand in production."""
    arrived: bool
    """Delivered just now, rather than there already."""
    production: Literal["moved", "stands", "elsewhere", "stood", "untouched", "waits", "refused"]
    """`elsewhere`: somebody moved the production ref since this run was compared with what it named. `stood`: this
    model was in production before and was replaced, so only a person puts it back. `untouched`: the gate did not pass.
    `waits`, `refused`: a person was to be asked, or said no."""
    by: str = ""
    """Who decided, where a person was asked."""

    def told(self, name: str) -> str:
        """What became of the production ref of the recipe called `name`, in words."""
        return {
            "moved": f"{name}/production now names this model",
            "stands": f"{name}/production names this model",
            "elsewhere": f"{name}/production was moved meanwhile and left alone; run again to compare with it",
            "stood": f"this model was in production before: `regrow promote {name}` puts it back",
            "untouched": "",
            "waits": f"waits for a person's yes: `regrow promote {name}`",
            "refused": f"{self.by or 'a person'} said no; {name}/production was left alone",
        }[self.production]


@dataclass(frozen=True)
class Answer:
    """What a person said about promoting a model that waits for it."""

    promote: bool
    why: str
    by: str


def settle(run: Run, answer: Answer | None = None) -> Outcome:
    """Promote and deliver the run's published model, where its recipe asks for approval only with a person's `answer`;
    else the one that production names, if an earlier run could not. Raises UserError when the run's own model cannot be
    delivered."""
    outcome = _settled(run, answer)
    if outcome.production not in ("moved", "stands"):
        try:
            bring_standing(run.store, run.runtime, run.name, run.to)
        except (UserError, BadBlob, OSError) as error:  # this run has ended as it has, whatever becomes of another's
            _log.warning("the model that %s/production names could not be delivered: %s", run.name, error)
    return outcome


def settle_found(run: Run) -> Outcome:
    """`settle` for a run that found every stage made: it comes on record only where production moves to its model."""
    try:
        outcome = settle(run)
    except BaseException as error:
        with suppress(UserError, OSError):  # where the store is what failed, that is told
            if run.store.hasty().read_run(run.id) is not None:
                run.record_end(error)
        raise
    if outcome.production == "moved":
        run.record("finished", asdict(outcome))
    return outcome


def _settled(run: Run, answer: Answer | None) -> Outcome:
    card, weights = run.artifacts["publish"], run.artifacts["merge"]
    config = run.config("publish")
    assert isinstance(config, PublishConfig)
    passed, reasons = bool(card.facts["passed"]), list(card.facts["reasons"])
    if not passed:
        return Outcome(False, reasons, "", False, "untouched")
    production = _promoted(run, weights, card, reasons, config.approval, answer)
    by = answer.by if answer else ""
    if production not in ("moved", "stands"):
        said = [answer.why] if answer and answer.why and production == "refused" else []
        return Outcome(True, [*reasons, *said], "", False, production, by)
    place = Place(run.to, config.private)
    brought = bring(run.store, run.runtime, run.name, place, weights, card, moved=production == "moved")
    if brought == "elsewhere":
        return Outcome(True, reasons, "", False, "elsewhere", by)
    return Outcome(True, reasons, run.to, brought == "arrived", production, by)


def _promoted(
    run: Run, weights: Artifact, card: Artifact, reasons: list[str], approval: bool, answer: Answer | None
) -> Literal["moved", "stands", "elsewhere", "stood", "waits", "refused"]:
    standing = standing_in(run.store, run.name)
    if standing is not None:
        if standing.now.model["digest"] == weights.digest:  # whatever key it was made under: it is the same model
            return "stands"
        if standing.stood(weights.digest):
            return "stood"
    if (standing and standing.version) != (run.production and run.production.version):
        return "elsewhere"
    if approval and not (answer and answer.promote):
        return "refused" if answer else "waits"
    rival = run.rival()
    # Every move names a run on record, with all that it used: what goes back to its model, or on from it, reads that.
    run.record("running")
    moved = promote(
        run.store,
        run.name,
        standing,
        model=named(weights),
        card=named(card),
        run=run.id,
        compared=named(rival) if rival else None,
        why="; ".join([*reasons, *([answer.why] if answer and answer.why else [])]),
        by=answer.by if answer else "gate",
    )
    return "moved" if moved else "elsewhere"


def named(artifact: Artifact) -> Name:
    """An artifact as the production ref names it."""
    return {"key": artifact.key, "digest": artifact.digest}


def outcome_json(outcome: Outcome) -> str:
    """For machines."""
    return json.dumps(outcome.__dict__)
