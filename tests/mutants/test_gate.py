"""What the gate and the comparison decide on, where a changed line went unnoticed by all other tests."""

import json
from pathlib import Path
from typing import Any

from stages.compare import compare
from stages.gate import Gate, decide
from stages.intervals import mean
from tests.stages.test_compare import loss, part


def both(folder: Path, reward: tuple[float, float], share: tuple[float, float], items: int = 20) -> Any:
    """A task in shares beside one whose scores are of any size, by base and tuned model."""
    for number, model in enumerate(("base", "tuned")):
        part(folder, f"{model}/share", [("t", share[number])] * items)
        part(folder, f"{model}/reward", [("t", reward[number])] * items)
        (folder / model / "reward/scores.json").write_text(json.dumps({"unbounded": True}))
    return compare(folder)


def test_a_gain_is_asked_of_shares_where_other_tasks_have_none(tmp_path: Path) -> None:
    found = both(tmp_path, reward=(2.0, 2.01), share=(0.0, 1.0))
    assert decide(Gate(min_gain=0.5), found)["passed"]
    [reason] = decide(Gate(min_gain=0.5), both(tmp_path / "less", reward=(2.0, 9.0), share=(0.5, 0.6)))["reasons"]
    assert reason.startswith("share: gains +0.100")


def test_rewards_that_happen_to_be_0_or_1_are_no_yes_and_no(tmp_path: Path) -> None:
    scores = [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    for model, own in (("base", scores), ("tuned", scores[::-1])):
        part(tmp_path, f"{model}/reward", [("t", each) for each in own])
        (tmp_path / model / "reward/scores.json").write_text(json.dumps({"unbounded": True}))
    task = compare(tmp_path)["tasks"]["reward"]
    assert task["base"] == mean(scores).document and task["tuned"] == mean(scores[::-1]).document
    assert task["difference"] == mean([b - a for a, b in zip(scores, scores[::-1], strict=True)]).document


def test_a_loss_of_production_that_is_no_number_is_no_task_beside_the_loss(tmp_path: Path) -> None:
    """What must be clearly better in held-out loss, where nothing else is measured, is no draw."""
    for model, sums in (("base", [1.0] * 6), ("tuned", [0.9, 1.1] * 3), ("production", [float("nan")] * 6)):
        loss(tmp_path, model, sums, [1] * 6)
    gate = Gate.model_validate({"require": "better", "production": {"require": "nothing"}})
    [reason] = decide(gate, compare(tmp_path))["reasons"]
    assert reason.startswith("held-out loss: not clearly better than the base model")


def test_margins_of_production_that_are_no_numbers_leave_the_others(tmp_path: Path) -> None:
    for model, margin in (("base", 0.5), ("tuned", 0.7), ("production", float("nan"))):
        part(tmp_path, f"{model}/heldout_loss", [("", 1.0)] * 6, task="heldout_preferences")
        document = {"sums": [1.0] * 6, "tokens": [1] * 6, "margins": [0.5] * 5 + [margin]}
        (tmp_path / model / "heldout_loss/scores.json").write_text(json.dumps(document))
    found = compare(tmp_path)
    json.dumps(found, allow_nan=False)
    assert set(found["tasks"]["heldout_preferences"]["margin"]) == {"base", "tuned", "difference", "better"}
