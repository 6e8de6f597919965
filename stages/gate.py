"""The gate before publishing: thresholds on the scores, as configuration; a pure decision with its reasons.

Two comparisons, each with thresholds of its own: with the base model, and with the model in production once there is
one.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from pydantic import Field

from stages.compare import (
    BASE,
    HELDOUT_LOSS,
    NOT_NUMBERS,
    OTHER_TOKENIZER,
    OVER_PRODUCTION,
    PRODUCTION,
    TOLD,
    TOO_FEW,
    TUNED,
    UNBOUNDED,
    UNCOMPARED,
)
from stages.identity import Json
from stages.stage import StageConfig

ROUNDING = 1e-9
"""How far a figure may miss its threshold: as floats, 7/20 - 6/20 is a little less than 0.05."""


class Thresholds(StageConfig):
    """What the tuned model must show against another one."""

    require: Literal["better", "not_worse", "nothing"] = "not_worse"
    """In every task: `better` wants the difference's 95 % interval above 0, `not_worse` refuses one below 0.

    Both refuse a held-out loss that clearly rose, unless `max_heldout_loss_increase` bounds it; without a task,
    `better` wants one that clearly fell."""
    min_gain: float | None = Field(default=None, ge=-1, le=1)
    """The least difference, tuned minus the other, in every task: 0.05 is five points of a hundred. What a reward model
    scores has no such points: `require` decides there."""
    max_heldout_loss_increase: float | None = None
    """The most by which the held-out loss may rise, clearly or not, in nats a trained token; below 0 wants a fall."""


class Gate(Thresholds):
    """What the tuned model must show before it is published: against the base model, and against production."""

    tasks: tuple[str, ...] = ()
    """The tasks that count, by name; all when empty."""
    production: Thresholds = Field(default_factory=Thresholds)
    """What it must show against the model in production, once there is one."""


class _Other(NamedTuple):
    """What the tuned model is compared with."""

    name: str
    words: str
    thresholds: Thresholds


def decide(gate: Gate, scores: Json) -> dict[str, Json]:
    """`{"passed": bool, "reasons": [...]}`: every failed condition told in one line each, or why it passed."""
    failed = list(dict.fromkeys(_failures(gate, scores)))
    if failed:
        return {"passed": False, "reasons": failed}
    counted, loss = _counted(gate, scores), scores["heldout_loss"]
    if not counted and not loss:
        return {"passed": True, "reasons": ["nothing was measured, so nothing speaks against it"]}
    measured = [
        (other, any(_against(other, task) for task in counted.values()), bool(loss and _against(other, loss)))
        for other in _others(gate)
    ]
    passed = [_summary(other, tasks, losses) for other, tasks, losses in measured if tasks or losses]
    uncompared = [f"{UNCOMPARED[0].lower()}{UNCOMPARED[1:]}"] if scores.get(OTHER_TOKENIZER) else []
    return {"passed": True, "reasons": [*passed, *uncompared]}


def _others(gate: Gate) -> list[_Other]:
    return [_Other("base", "the base model", gate), _Other("production", "the model in production", gate.production)]


def _counted(gate: Gate, scores: Json) -> dict[str, Json]:
    """The tasks that count. Naming a group, such as `mmlu`, names all its tasks."""
    if not gate.tasks:
        return dict(scores["tasks"])
    return {n: t for n, t in scores["tasks"].items() if _counts(gate, n)}


def _counts(gate: Gate, task: str) -> bool:
    return not gate.tasks or task in gate.tasks or task.split("/")[0] in gate.tasks


def _not_numbers(gate: Gate, scores: Json) -> dict[str, list[str]]:
    """What counts and is no number, with the models whose figures are none."""
    # A broken model in production must not stay there for good: with nothing asked against it, it does not count.
    ignored = {PRODUCTION} if gate.production == Thresholds(require="nothing") else set()
    counted = {n: m for n, m in scores.get(NOT_NUMBERS, {}).items() if n == HELDOUT_LOSS or _counts(gate, n)}
    return {name: [model for model in models if model not in ignored] for name, models in counted.items()}


def _failures(gate: Gate, scores: Json) -> Iterator[str]:
    counted, broken = _counted(gate, scores), _not_numbers(gate, scores)
    words = {BASE: "the base model", TUNED: "the tuned model", PRODUCTION: "the model in production"}
    for name, models in broken.items():
        yield from (f"{TOLD.get(name, name)}: a figure of {words[model]} is not a number" for model in models)
    evaluated = {*counted, *broken} - {HELDOUT_LOSS}
    for name in gate.tasks:
        if not any(name in (task, task.split("/")[0]) for task in evaluated):
            yield f"{name}: the gate asks for this task, and it was not evaluated"
    if scores.get("agreeing") != scores.get("scored_twice"):
        yield f"lm-eval and our own scorer agree on only {scores['agreeing']} of {scores['scored_twice']} answers"
    loss = scores["heldout_loss"]
    for other in _others(gate):
        # Whether a model stands in production is told by what was measured; where nothing was, nobody knows.
        there = _against(other, loss) is not None if loss else not broken
        gain = other.thresholds.min_gain is not None or (other.thresholds.require == "better" and not loss)
        if not evaluated and there and gain:
            yield f"the gate asks for a gain over {other.words}, and no task was evaluated"
        compared = [task for task in counted.values() if _against(other, task) is not None]
        if other.thresholds.min_gain is not None and compared and all(UNBOUNDED in task for task in compared):
            yield (
                f"min_gain against {other.words} is in shares of 1, and every task that counts is scored by numbers "
                "of any size, as rewards are: ask for `require: better` instead"
            )
        for name, task in counted.items():
            yield from _task_failures(other, name, _against(other, task), UNBOUNDED in task)
        if loss is not None or HELDOUT_LOSS not in broken:
            yield from _loss_failures(other, loss, alone=not evaluated)
    if scores.get(OTHER_TOKENIZER):
        yield from _uncompared_failures(gate.production, any(OVER_PRODUCTION in task for task in counted.values()))


def _against(other: _Other, entry: Json) -> Json:
    """The comparison with that model, or None."""
    return entry if other.name == "base" else entry.get(OVER_PRODUCTION)


def _task_failures(other: _Other, name: str, compared: Json, unbounded: bool) -> Iterator[str]:
    if compared is None:
        return
    wanted, difference = other.thresholds, compared["difference"]
    told = f"{difference['value']:+.3f} ({_interval(difference, 3)})"
    if wanted.require == "better" and compared["better"] != "tuned":
        yield f"{name}: not clearly better than {other.words}, {told}"
    if wanted.require == "not_worse" and compared["better"] == other.name:
        yield f"{name}: clearly worse than {other.words}, {told}"
    if wanted.min_gain is not None and not unbounded and difference["value"] < wanted.min_gain - ROUNDING:
        over = "" if other.name == "base" else f" over {other.words}"
        yield f"{name}: gains {told}{over}, and the gate asks for {wanted.min_gain:+.3f}"


def _loss_failures(other: _Other, loss: Json, alone: bool) -> Iterator[str]:
    """What speaks against the held-out loss; `alone` where no task was measured beside it."""
    most, require = other.thresholds.max_heldout_loss_increase, other.thresholds.require
    if loss is None:
        if most is not None:
            yield "the gate bounds the held-out loss, and pack held out no rows (`pack.heldout_fraction`)"
        return
    compared = _against(other, loss)
    if compared is None:
        return
    change = compared["difference"]
    over = "" if other.name == "base" else f" against {other.words}"
    if most is not None:
        if change["value"] > most + ROUNDING:
            yield f"held-out loss changes by {change['value']:+.4f} nats a token{over}, and the gate allows {most:+.4f}"
        return
    told = f"{change['value']:+.4f} nats a token ({_interval(change, 4)})"
    if require != "nothing" and compared["better"] == other.name:
        yield f"held-out loss: clearly worse than {other.words}, {told}"
    elif require == "better" and alone and compared["better"] != "tuned":
        yield f"held-out loss: not clearly better than {other.words}, {told}"


def _uncompared_failures(wanted: Thresholds, tasks: bool) -> Iterator[str]:
    """What the gate asks of the held-out loss against production, where that has another tokenizer; `tasks` where a
    task compares the two."""
    if wanted.max_heldout_loss_increase is not None:
        yield f"{UNCOMPARED}, and the gate bounds that: take `max_heldout_loss_increase` of production out"
    elif not tasks and (wanted.require != "nothing" or wanted.min_gain is not None):
        yield (
            f"{UNCOMPARED}, and no task compares the two: add one to `evaluate.tasks`, or set "
            "`publish.gate.production: {require: nothing}` alone for this run"
        )


def _interval(difference: Json, digits: int) -> str:
    if TOO_FEW in difference:
        return "too few items for an interval"
    return f"95 % interval {difference['low']:+.{digits}f} to {difference['high']:+.{digits}f}"


def _summary(other: _Other, tasks: bool, loss: bool) -> str:
    """Why it passed, of what was measured."""
    words = {
        "better": f"clearly better than {other.words}",
        "not_worse": f"not clearly worse than {other.words}",
        "nothing": f"the gate asks for nothing against {other.words}",
    }
    require = other.thresholds.require
    if require == "better" and tasks:
        return f"{words[require]} in every task"
    measured = [*(["in any task"] if tasks else []), *(["in held-out loss"] if loss else [])]
    return f"{words[require]} {' or '.join(measured)}"
