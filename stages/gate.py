"""The gate before publishing: thresholds on the scores, as configuration; a pure decision with its reasons."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from stages.identity import Json
from stages.stage import StageConfig


class Gate(StageConfig):
    """What the tuned model must show against the base model before it is published."""

    require: Literal["better", "not_worse", "nothing"] = "not_worse"
    """In every task: `better` wants the difference's 95 % interval above 0, `not_worse` refuses one below 0."""
    tasks: tuple[str, ...] = ()
    """The tasks that count, by name; all when empty."""
    min_gain: float | None = Field(default=None, ge=-1, le=1)
    """The least difference, tuned minus base, in every task: 0.05 is five points of a hundred."""
    max_heldout_loss_increase: float | None = None
    """The most by which the held-out loss may rise, in nats a trained token; negative asks for a fall."""


def decide(gate: Gate, scores: Json) -> dict[str, Json]:
    """`{"passed": bool, "reasons": [...]}`: every failed condition told in one line each, or why it passed."""
    failed = list(_failures(gate, scores))
    if failed:
        return {"passed": False, "reasons": failed}
    measured = len(_counted(gate, scores)) + bool(scores["heldout_loss"])
    return {
        "passed": True,
        "reasons": [_summary(gate)] if measured else ["nothing was measured, so nothing speaks against it"],
    }


def _counted(gate: Gate, scores: Json) -> dict[str, Json]:
    """The tasks that count. Naming a group, such as `mmlu`, names all its tasks."""
    if not gate.tasks:
        return dict(scores["tasks"])
    return {n: t for n, t in scores["tasks"].items() if n in gate.tasks or n.split("/")[0] in gate.tasks}


def _failures(gate: Gate, scores: Json) -> Iterator[str]:
    counted = _counted(gate, scores)
    for name in gate.tasks:
        if not any(name in (task, task.split("/")[0]) for task in counted):
            yield f"{name}: the gate asks for this task, and it was not evaluated"
    if scores.get("agreeing") != scores.get("scored_twice"):
        yield f"lm-eval and our own scorer agree on only {scores['agreeing']} of {scores['scored_twice']} answers"
    if not counted and (gate.require == "better" or gate.min_gain is not None):
        yield "the gate asks for a gain, and no task was evaluated"
    for name, task in counted.items():
        yield from _task_failures(gate, name, task)
    yield from _loss_failures(gate, scores["heldout_loss"])


def _task_failures(gate: Gate, name: str, task: Json) -> Iterator[str]:
    difference = task["difference"]
    told = f"{difference['value']:+.3f} (95 % interval {difference['low']:+.3f} to {difference['high']:+.3f})"
    if gate.require == "better" and task["better"] != "tuned":
        yield f"{name}: not clearly better than the base model, {told}"
    if gate.require == "not_worse" and task["better"] == "base":
        yield f"{name}: clearly worse than the base model, {told}"
    if gate.min_gain is not None and difference["value"] < gate.min_gain:
        yield f"{name}: gains {told}, and the gate asks for {gate.min_gain:+.3f}"


def _loss_failures(gate: Gate, loss: Json) -> Iterator[str]:
    if gate.max_heldout_loss_increase is None:
        return
    if loss is None:
        yield "the gate bounds the held-out loss, and pack held out no rows (`pack.heldout_fraction`)"
    elif loss["difference"]["value"] > gate.max_heldout_loss_increase:
        yield (
            f"held-out loss changes by {loss['difference']['value']:+.4f} nats a token, and the gate allows "
            f"{gate.max_heldout_loss_increase:+.4f}"
        )


def _summary(gate: Gate) -> str:
    words = {
        "better": "clearly better than the base model in every task",
        "not_worse": "not clearly worse than the base model in any task",
        "nothing": "the gate asks for nothing in the tasks",
    }
    return words[gate.require]
