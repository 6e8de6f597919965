"""What a model is promoted on, where a changed line went unnoticed by all other tests."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from stages.compare import compare
from stages.errors import UserError
from stages.gate import Gate, decide
from tests.stages.test_compare import loss, part
from tests.stages.test_gate import BEATS, BETTER, scores

NOT_A_NUMBER = "held-out loss: a figure of the tuned model is not a number"


def test_a_task_that_does_not_count_is_no_comparison_with_production() -> None:
    """Or a model would replace one that it was compared with in nothing that the gate looks at."""
    found = {**scores(mine=BETTER, other=BEATS), "other_tokenizer": True}
    assert decide(Gate(), found)["passed"]
    [reason] = decide(Gate(tasks=("mine",)), found)["reasons"]
    assert "no task compares the two" in reason


def test_what_is_no_number_is_the_only_reason_where_nothing_else_was_measured() -> None:
    """A reader would look for a task that is missing, or for a loss that rose."""
    broken = {**scores(), "not_numbers": {"heldout_loss": ["tuned"]}}
    assert decide(Gate(require="better"), broken)["reasons"] == [NOT_A_NUMBER]
    beside = {**scores(loss_change=0.0), "not_numbers": {"worth": ["tuned"]}}
    told = ["worth: a figure of the tuned model is not a number"]
    assert decide(Gate(require="better"), beside)["reasons"] == told


def test_a_base_model_that_gives_no_numbers_is_named(tmp_path: Path) -> None:
    for model, score in (("base", math.nan), ("tuned", 0.5)):
        part(tmp_path, f"{model}/worth", [("t", score)] * 6)
        loss(tmp_path, model, [score] * 6, [1] * 6)
    found = compare(tmp_path)
    assert found["tasks"] == {} and found["heldout_loss"] is None
    assert found["not_numbers"] == {"worth": ["base"], "heldout_loss": ["base"]}


def test_losses_of_other_sequences_are_not_compared(tmp_path: Path) -> None:
    """A loss a token would be of the base model's tokens for both."""
    for model, tokens in (("base", [5] * 6), ("tuned", [5] * 5 + [6])):
        loss(tmp_path, model, [1.0] * 6, tokens)
    with pytest.raises(AssertionError, match="two lists of sequences"):
        compare(tmp_path)


@pytest.mark.parametrize("large", ["base", "tuned", "production"])
def test_scores_are_shares_only_where_those_of_all_models_are(tmp_path: Path, large: str) -> None:
    for model in ("base", "tuned", "production"):
        part(tmp_path, f"{model}/bleu", [("t", 7.0 if model == large else 1.0)] * 6)
    assert compare(tmp_path)["tasks"]["bleu"]["unbounded"]


@pytest.mark.parametrize("told", ["base", "tuned"])
def test_a_task_without_bounds_is_one_whichever_model_says_so(tmp_path: Path, told: str) -> None:
    for model in ("base", "tuned"):
        part(tmp_path, f"{model}/reward", [("t", 1.0)] * 6)
        (tmp_path / model / "reward/scores.json").write_text(json.dumps({"unbounded": model == told}))
    assert compare(tmp_path)["tasks"]["reward"]["unbounded"]


@pytest.mark.parametrize("model", ["base", "tuned", "production"])
@pytest.mark.parametrize("of", ["task", "item", "target", "metric"])
def test_a_model_that_was_asked_other_items_is_compared_with_none(tmp_path: Path, model: str, of: str) -> None:
    """The newest of them may have been scored by another lm-eval than the others."""
    for each in ("base", "tuned", "production"):
        part(tmp_path, f"{each}/gsm8k", [("t", 1.0)] * 6)
    file = tmp_path / model / "gsm8k/samples.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3][of] = 99 if of == "item" else "another"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="the models were not asked the same items"):
        compare(tmp_path)
