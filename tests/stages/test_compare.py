"""Laying two models side by side: pairs, directions, leaf tasks, held-out loss, and the report's words."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from stages.compare import compare, report, samples
from stages.errors import UserError
from stages.gate import Gate, decide
from stages.identity import canonical_json
from stages.intervals import newcombe


def part(folder: Path, name: str, answers: Sequence[tuple[str, float]], task: str = "") -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / name / "samples.jsonl").open("a") as file:
        for item, (answer, score) in enumerate(answers):
            line = {"task": task, "item": item, "question": f"q{item}", "target": "t", "metric": "exact_match"}
            file.write(json.dumps({**line, "answer": answer, "score": score}) + "\n")
    (folder / name / "scores.json").write_text(json.dumps({"tasks": {}, "scored_twice": 2, "agreeing": 2}))


def loss(folder: Path, model: str, sums: list[float], tokens: list[int]) -> None:
    (folder / model / "heldout_loss").mkdir(parents=True)
    (folder / model / "heldout_loss/scores.json").write_text(json.dumps({"sums": sums, "tokens": tokens}))


def test_a_gain_is_told_with_intervals_and_the_better_model(tmp_path: Path) -> None:
    part(tmp_path, "base/spelling", [("no", 0.0)] * 38 + [("t", 1.0)] * 2)
    part(tmp_path, "tuned/spelling", [("t", 1.0)] * 30 + [("no", 0.0)] * 8 + [("t", 1.0)] * 2)
    found = compare(tmp_path)
    task = found["tasks"]["spelling"]
    assert (task["metric"], task["n"], task["better"]) == ("exact_match", 40, "tuned")
    assert (task["base"]["value"], task["tuned"]["value"]) == (0.05, 0.8)
    assert task["difference"] == newcombe(2, 0, 30, 8).document
    assert found["heldout_loss"] is None
    assert (found["scored_twice"], found["agreeing"]) == (4, 4)
    text = report(found)
    assert "| spelling | exact_match | 40 | 5.0 % (" in text
    assert "| +75.0 (" in text
    assert text.splitlines()[2].endswith("| tuned |")


def test_less_loss_is_better_and_a_lower_score_is_not(tmp_path: Path) -> None:
    part(tmp_path, "base/spelling", [("t", 1.0)] * 30)
    part(tmp_path, "tuned/spelling", [("no", 0.0)] * 30)
    loss(tmp_path, "base", [20.0, 30.0, 28.0, 21.0, 18.0], [10, 14, 13, 11, 9])
    loss(tmp_path, "tuned", [10.0, 15.0, 14.0, 12.0, 9.0], [10, 14, 13, 11, 9])
    found = compare(tmp_path)
    assert found["tasks"]["spelling"]["better"] == "base"
    heldout = found["heldout_loss"]
    assert heldout["better"] == "tuned"
    assert heldout["tokens"] == 57
    assert heldout["base"]["value"] == pytest.approx(117 / 57)
    assert heldout["difference"]["value"] == pytest.approx(-1.0)
    assert "| held-out rows | loss, nats a token | 57 tokens | 2.053 (" in report(found)


def test_questions_that_lost_their_beginning_are_told(tmp_path: Path) -> None:
    for model in ("base", "tuned"):
        part(tmp_path, f"{model}/spelling", [("t", 1.0)] * 30)
        (tmp_path / model / "spelling/scores.json").write_text(json.dumps({"tasks": {}, "cut_questions": 2}))
    assert "**4 questions are longer than the model's context and lost their beginning.**" in report(compare(tmp_path))


@pytest.mark.parametrize("gained", [0, 1])
def test_a_draw_and_a_small_gain_are_unclear(gained: int, tmp_path: Path) -> None:
    part(tmp_path, "base/spelling", [("t", 1.0), ("no", 0.0)] * 10 + [("no", 0.0)])
    part(tmp_path, "tuned/spelling", [("no", 0.0), ("t", 1.0)] * 10 + [("t", float(gained))])
    task = compare(tmp_path)["tasks"]["spelling"]
    assert task["difference"]["value"] == pytest.approx(gained / 21)
    assert task["better"] == "unclear"


def test_a_group_shows_its_tasks_one_by_one(tmp_path: Path) -> None:
    for model in ("base", "tuned"):
        part(tmp_path, f"{model}/mmlu", [("a", 1.0)] * 3, task="mmlu_law")
        part(tmp_path, f"{model}/mmlu", [("a", 0.0)] * 2, task="mmlu_art")
        part(tmp_path, f"{model}/gsm8k", [("a", 0.0)] * 2, task="gsm8k")
    assert {name: task["n"] for name, task in compare(tmp_path)["tasks"].items()} == {
        "gsm8k": 2,
        "mmlu/mmlu_law": 3,
        "mmlu/mmlu_art": 2,
    }


def test_samples_hold_both_answers(tmp_path: Path) -> None:
    part(tmp_path, "base/spelling", [("no", 0.0)])
    part(tmp_path, "tuned/spelling", [("t", 1.0)])
    [sample] = samples(tmp_path)
    assert sample == {
        "task": "spelling",
        "item": 0,
        "question": "q0",
        "target": "t",
        "metric": "exact_match",
        "base": "no",
        "tuned": "t",
        "base_score": 0.0,
        "tuned_score": 1.0,
    }


def test_the_model_in_production_stands_beside_the_others(tmp_path: Path) -> None:
    part(tmp_path, "base/spelling", [("no", 0.0)] * 40)
    part(tmp_path, "production/spelling", [("t", 1.0)] * 35 + [("no", 0.0)] * 5)
    part(tmp_path, "tuned/spelling", [("t", 1.0)] * 10 + [("no", 0.0)] * 30)
    for model, sums in (("base", [30.0] * 5), ("production", [10.0] * 5), ("tuned", [20.0] * 5)):
        loss(tmp_path, model, sums, [10] * 5)
    found = compare(tmp_path)
    task, heldout = found["tasks"]["spelling"], found["heldout_loss"]
    assert task["production"]["value"] == 0.875
    assert task["over_production"] == {"difference": newcombe(10, 25, 0, 5).document, "better": "production"}
    assert task["better"] == heldout["better"] == "tuned"
    assert heldout["over_production"]["difference"]["value"] == pytest.approx(1.0)
    assert heldout["over_production"]["better"] == "production"
    text = report(found)
    assert "Against the model that stood in production" in text
    assert "| spelling | 87.5 % (" in text and "| -62.5 (" in text
    [first, *_] = samples(tmp_path)
    assert (first["base"], first["production"], first["tuned"]) == ("no", "t", "t")


@pytest.mark.parametrize("change", ["target", "count"])
def test_models_that_were_asked_other_items_are_not_compared(change: str, tmp_path: Path) -> None:
    """lm-eval or its data may change between the day the base model was scored and the tuned model's."""
    part(tmp_path, "base/gsm8k", [("t", 1.0)] * (30 if change == "target" else 29))
    part(tmp_path, "tuned/gsm8k", [("t", 1.0)] * 30)
    if change == "target":
        file = tmp_path / "base/gsm8k/samples.jsonl"
        file.write_text(file.read_text().replace('"target": "t"', '"target": "older"', 1))
    with pytest.raises(UserError, match=r"gsm8k: the models were not asked the same items.*--force evaluate"):
        compare(tmp_path)


def test_log_likelihoods_are_no_shares(tmp_path: Path) -> None:
    """What an item of lm-eval's `perplexity` is."""
    part(tmp_path, "base/lambada", [("a", -5.0)] * 20)
    part(tmp_path, "tuned/lambada", [("a", -4.0 - 0.01 * item) for item in range(20)])
    found = compare(tmp_path)
    task = found["tasks"]["lambada"]
    assert task["unbounded"] and task["better"] == "tuned"
    assert "-5.000 (-5.000 to -5.000)" in report(found) and "-500" not in report(found)
    [reason] = decide(Gate(min_gain=0.05), found)["reasons"]
    assert "is in shares of 1" in reason


def test_nothing_measured_says_so(tmp_path: Path) -> None:
    loss(tmp_path, "base", [], [])
    loss(tmp_path, "tuned", [], [])
    assert report(compare(tmp_path)).startswith("Nothing was measured")


NONE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("none", NONE)
def test_a_loss_that_is_no_number_is_named_and_never_passes(none: float, tmp_path: Path) -> None:
    part(tmp_path, "base/spelling", [("t", 0.0)] * 30)
    part(tmp_path, "tuned/spelling", [("t", 1.0)] * 30)
    loss(tmp_path, "base", [10.0] * 5, [5] * 5)
    loss(tmp_path, "tuned", [8.0] * 4 + [none], [5] * 5)
    found = compare(tmp_path)
    canonical_json(found)  # the facts hold no NaN
    assert found["heldout_loss"] is None and found["not_numbers"] == {"heldout_loss": ["tuned"]}
    told = "held-out loss: a figure of the tuned model is not a number"
    for gate in (Gate(), Gate(require="nothing"), Gate(require="better"), Gate(max_heldout_loss_increase=0.0)):
        assert decide(gate, found) == {"passed": False, "reasons": [told]}
    assert f"**{told}.**" in report(found) and "| spelling |" in report(found)


@pytest.mark.parametrize("none", NONE)
@pytest.mark.parametrize("unbounded", [True, False])
def test_a_score_that_is_no_number_is_named_and_never_passes(unbounded: bool, none: float, tmp_path: Path) -> None:
    for name in ("worth", "other"):
        for model in ("base", "tuned"):
            score = none if (name, model) == ("worth", "tuned") else 0.5
            part(tmp_path, f"{model}/{name}", [("t", 0.5)] * 5 + [("t", score)])
            (tmp_path / model / name / "scores.json").write_text(json.dumps({"unbounded": unbounded}))
    found = compare(tmp_path)
    canonical_json(found)
    assert list(found["tasks"]) == ["other"] and found["not_numbers"] == {"worth": ["tuned"]}
    told = "worth: a figure of the tuned model is not a number"
    for gate in (Gate(), Gate(tasks=("worth",)), Gate(tasks=("worth",), min_gain=0.1, require="better")):
        assert decide(gate, found) == {"passed": False, "reasons": [told]}
    assert decide(Gate(tasks=("other",)), found)["passed"]
    assert f"**{told}.**" in report(found)


def test_a_margin_that_is_no_number_takes_its_task_along(tmp_path: Path) -> None:
    for model, margin in (("base", 0.5), ("tuned", math.nan)):
        part(tmp_path, f"{model}/heldout_loss", [("", 1.0)] * 6, task="heldout_preferences")
        document = {"sums": [1.0] * 6, "tokens": [1] * 6, "margins": [0.5] * 5 + [margin]}
        (tmp_path / model / "heldout_loss/scores.json").write_text(json.dumps(document))
    found = compare(tmp_path)
    canonical_json(found)
    assert found["tasks"] == {} and found["not_numbers"] == {"heldout_preferences": ["tuned"]}
    assert found["heldout_loss"]["better"] == "unclear"


def test_production_that_gives_no_numbers_leaves_the_comparison_with_the_base_model(tmp_path: Path) -> None:
    for model, score in (("base", 0.2), ("tuned", 0.6), ("production", math.nan)):
        part(tmp_path, f"{model}/worth", [("t", score)] * 6)
        loss(tmp_path, model, [score] * 6, [1] * 6)
    found = compare(tmp_path)
    canonical_json(found)
    assert found["not_numbers"] == {"worth": ["production"], "heldout_loss": ["production"]}
    assert found["tasks"]["worth"]["better"] == "tuned" and found["heldout_loss"]["better"] == "base"
    assert "production" not in found["tasks"]["worth"] and "production" not in found["heldout_loss"]
    asks_nothing_of_base = {"require": "nothing", "tasks": ("worth",)}
    reasons = decide(Gate.model_validate(asks_nothing_of_base), found)["reasons"]
    assert reasons == [
        "worth: a figure of the model in production is not a number",
        "held-out loss: a figure of the model in production is not a number",
    ]
    nothing = Gate.model_validate({**asks_nothing_of_base, "production": {"require": "nothing"}})
    assert decide(nothing, found)["passed"], "a broken model in production does not stay there for good"


@pytest.mark.parametrize(("items", "better"), [(1, "unclear"), (4, "unclear"), (5, "tuned")])
def test_fewer_than_five_items_are_unclear(items: int, better: str, tmp_path: Path) -> None:
    for model, score in (("base", 0.5), ("tuned", 0.6)):
        part(tmp_path, f"{model}/share", [("t", score)] * items)
        part(tmp_path, f"{model}/reward", [("t", score)] * items)
        (tmp_path / model / "reward/scores.json").write_text(json.dumps({"unbounded": True}))
        loss(tmp_path, model, [100 - score] * items, [50] * items)
    found = compare(tmp_path)
    assert {entry["better"] for entry in (*found["tasks"].values(), found["heldout_loss"])} == {better}
    assert decide(Gate(), found)["passed"]
    decision = decide(Gate(require="better"), found)
    assert decision["passed"] is (better == "tuned")
    if better == "unclear":
        assert (
            "share: not clearly better than the base model, +0.100 (too few items for an interval)"
            in (decision["reasons"])
        )
        assert "| share | exact_match | " in report(found)
        assert "| +10.0 (too few items for an interval) | unclear |" in report(found)
        assert "| -0.002 (too few items for an interval) | unclear |" in report(found)
    else:
        assert "too few" not in report(found)


def test_one_packed_sequence_does_not_refuse_a_model(tmp_path: Path) -> None:
    loss(tmp_path, "base", [1000.0], [500])
    loss(tmp_path, "tuned", [1000.05], [500])
    assert decide(Gate(), compare(tmp_path))["passed"]
