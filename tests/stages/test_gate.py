"""Gate decisions: what passes, what fails, and that better scores never turn a pass into a failure."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.evaluate import EvaluateConfig
from stages.gate import Gate, decide
from stages.intervals import paired_difference, share
from stages.publish import PublishConfig


def task(base: list[int], tuned: list[int]) -> dict[str, Any]:
    difference = paired_difference(base, tuned)
    better = "tuned" if difference.low > 0 else "base" if difference.high < 0 else "unclear"
    return {
        "metric": "exact_match",
        "n": len(base),
        "base": share(base).document,
        "tuned": share(tuned).document,
        "difference": difference.document,
        "better": better,
    }


def scores(loss_change: float | None = None, agreeing: int = 8, **tasks: dict[str, Any]) -> dict[str, Any]:
    loss = None if loss_change is None else loss_entry(loss_change)
    return {"tasks": tasks, "heldout_loss": loss, "scored_twice": 8, "agreeing": agreeing}


def loss_entry(change: float, other: str = "base", width: float = 0.05) -> dict[str, Any]:
    """A held-out loss that changed by so much, give or take `width`."""
    better = other if change > width else "tuned" if change < -width else "unclear"
    return {"difference": {"value": change, "low": change - width, "high": change + width}, "better": better}


def over_production(entry: dict[str, Any], base: list[int], tuned: list[int]) -> dict[str, Any]:
    """The entry with a production model that answers like `base`."""
    compared = task(base, tuned)
    better = {"tuned": "tuned", "base": "production"}.get(compared["better"], "unclear")
    over = {"difference": compared["difference"], "better": better}
    return {**entry, "production": compared["base"], "over_production": over}


BETTER = task([0] * 50, [1] * 30 + [0] * 20)
WORSE = task([1] * 30 + [0] * 20, [0] * 50)
SAME = task([1, 0] * 25, [0, 1] * 25)


@pytest.mark.parametrize(
    ("gate", "found", "passes"),
    [
        (Gate(), scores(spelling=BETTER), True),
        (Gate(), scores(spelling=SAME), True),
        (Gate(), scores(spelling=BETTER, chat=WORSE), False),
        (Gate(tasks=("spelling",)), scores(spelling=BETTER, chat=WORSE), True),
        (Gate(tasks=("mmlu",)), scores(**{"mmlu/history": WORSE}), False),
        (Gate(tasks=("gone",)), scores(spelling=BETTER), False),
        (Gate(require="better"), scores(spelling=BETTER), True),
        (Gate(require="better"), scores(spelling=SAME), False),
        (Gate(require="better"), scores(), False),
        (Gate(require="nothing"), scores(spelling=WORSE), True),
        (Gate(min_gain=0.5), scores(spelling=BETTER), True),
        (Gate(min_gain=0.7), scores(spelling=BETTER), False),
        (Gate(min_gain=0.0), scores(), False),
        (Gate(), scores(), True),
        (Gate(max_heldout_loss_increase=0.0), scores(loss_change=-0.1), True),
        (Gate(max_heldout_loss_increase=0.0), scores(loss_change=0.1), False),
        (Gate(max_heldout_loss_increase=0.0), scores(), False),
        (Gate(), scores(spelling=BETTER, agreeing=7), False),
        (Gate(), scores(loss_change=4.0), False),
        (Gate(), scores(loss_change=4.0, spelling=BETTER), False),
        (Gate(), scores(loss_change=0.01), True),
        (Gate(max_heldout_loss_increase=5.0), scores(loss_change=4.0), True),
        (Gate(require="nothing"), scores(loss_change=4.0), True),
        (Gate(require="better"), scores(loss_change=-1.0), True),
        (Gate(require="better"), scores(loss_change=-0.01), False),
        (Gate(require="better"), scores(loss_change=-0.01, spelling=BETTER), True),
    ],
)
def test_decisions(gate: Gate, found: dict[str, Any], passes: bool) -> None:
    decision = decide(gate, found)
    assert decision["passed"] is passes
    assert decision["reasons"]


def test_a_failure_names_task_and_numbers() -> None:
    [reason] = decide(Gate(), scores(chat=WORSE))["reasons"]
    assert reason.startswith("chat: clearly worse than the base model, -0.600 (95 % interval -0.7")


BEATS = over_production(BETTER, [0] * 50, [1] * 30 + [0] * 20)
"""Better than the base model and than production; the next one only than the base model."""
LOSES = over_production(BETTER, [1] * 50, [1] * 30 + [0] * 20)


@pytest.mark.parametrize(
    ("gate", "found", "passes"),
    [
        ({}, BEATS, True),
        ({}, LOSES, False),
        ({"production": {"require": "nothing"}}, LOSES, True),
        ({"production": {"require": "better"}}, BEATS, True),
        ({"production": {"require": "better"}}, over_production(BETTER, [1, 0] * 25, [0, 1] * 25), False),
        ({"production": {"min_gain": 0.7}}, BEATS, False),
        ({"production": {"require": "better"}}, BETTER, True),
    ],
    ids=["beats", "loses", "asks nothing", "better", "a draw", "too little", "nothing stands there"],
)
def test_production_has_thresholds_of_its_own(gate: dict[str, Any], found: dict[str, Any], passes: bool) -> None:
    decision = decide(Gate.model_validate(gate), scores(spelling=found))
    assert decision["passed"] is passes
    if not passes:
        assert all("the model in production" in reason for reason in decision["reasons"])


GAINS = [{"min_gain": 0.05}, {"require": "better"}, {"require": "nothing", "min_gain": 0.05}]


@pytest.mark.parametrize("wanted", GAINS)
def test_a_gain_over_production_that_nothing_compares_does_not_pass(wanted: dict[str, Any]) -> None:
    gate = Gate.model_validate({"require": "nothing", "production": wanted})
    [reason] = decide(gate, scores())["reasons"]
    assert reason == "the gate asks for a gain over the model in production, and no task was evaluated"
    apart = {**scores(heldout_preferences=BETTER), "other_tokenizer": True}
    [reason] = decide(gate, apart)["reasons"]
    assert "has another tokenizer" in reason and "no task compares the two: add one" in reason
    assert decide(gate, scores(loss_change=-1.0))["passed"], "nothing stands there"
    clear = {**loss_entry(-1.0), "over_production": loss_entry(-1.0, "production")}
    beaten = decide(gate, {**scores(), "heldout_loss": clear})
    assert beaten["passed"] is ("min_gain" not in wanted), "a loss has no points"


def test_passing_says_what_it_was_compared_with() -> None:
    assert decide(Gate(), scores(spelling=BETTER))["reasons"] == ["not clearly worse than the base model in any task"]
    assert decide(Gate(), scores(spelling=BEATS))["reasons"][1:] == [
        "not clearly worse than the model in production in any task"
    ]


def test_a_bound_on_held_out_loss_counts_against_production_too() -> None:
    gate = Gate.model_validate({"production": {"max_heldout_loss_increase": 0.0}})
    loss = {**loss_entry(-1.0), "over_production": loss_entry(0.2, "production")}
    [reason] = decide(gate, {**scores(), "heldout_loss": loss})["reasons"]
    assert reason.startswith("held-out loss changes by +0.2000 nats a token against the model in production")


def test_a_held_out_loss_that_clearly_rose_is_not_promoted() -> None:
    [reason] = decide(Gate(), scores(loss_change=0.4))["reasons"]
    assert reason == (
        "held-out loss: clearly worse than the base model, +0.4000 nats a token (95 % interval +0.3500 to +0.4500)"
    )
    loss = {**loss_entry(-1.0), "over_production": loss_entry(0.2, "production")}
    [reason] = decide(Gate(), {**scores(), "heldout_loss": loss})["reasons"]
    assert reason.startswith("held-out loss: clearly worse than the model in production, +0.2000")
    passed = decide(Gate(), {**scores(), "heldout_loss": loss_entry(-1.0)})
    assert passed == {"passed": True, "reasons": ["not clearly worse than the base model in held-out loss"]}


ITEMS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)
GATES = st.builds(
    Gate,
    require=st.sampled_from(["better", "not_worse", "nothing"]),
    min_gain=st.none() | st.floats(-1, 1),
    max_heldout_loss_increase=st.none() | st.floats(-1, 1),
)


@settings(deadline=None)
@given(GATES, ITEMS, st.integers(0, 59), st.floats(-2, 2), st.floats(0, 1))
def test_a_model_that_scores_better_still_passes(
    gate: Gate, items: list[tuple[int, int]], place: int, loss: float, fall: float
) -> None:
    base, tuned = [b for b, _ in items], [t for _, t in items]
    # The item improves from wrong to right where the base model is wrong: table cells move from neither to only tuned.
    place %= len(items)
    improved = [1 if i == place and not base[i] else t for i, t in enumerate(tuned)]
    before = decide(gate, scores(loss, spelling=task(base, tuned)))
    after = decide(gate, scores(loss - fall, spelling=task(base, improved)))
    assert after["passed"] or not before["passed"]


@settings(deadline=None)
@given(GATES, ITEMS)
def test_stricter_requirements_pass_less(gate: Gate, items: list[tuple[int, int]]) -> None:
    found = scores(0.0, spelling=task([b for b, _ in items], [t for _, t in items]))
    order = ["better", "not_worse", "nothing"]
    passes = [decide(gate.model_copy(update={"require": require}), found)["passed"] for require in order]
    assert passes == sorted(passes)


@pytest.mark.parametrize(("before", "after", "items", "gain"), [(6, 7, 20, 0.05), (3, 4, 10, 0.1), (60, 70, 200, 0.05)])
def test_exactly_the_gain_that_is_asked_for_is_enough(before: int, after: int, items: int, gain: float) -> None:
    found = scores(spelling=task([1] * before + [0] * (items - before), [1] * after + [0] * (items - after)))
    assert found["tasks"]["spelling"]["difference"]["value"] == pytest.approx(gain)
    assert decide(Gate(min_gain=gain), found)["passed"]
    assert not decide(Gate(min_gain=gain + 1e-6), found)["passed"]


def test_exactly_the_loss_that_is_allowed_is_allowed() -> None:
    change = 0.1 + 0.2
    assert change > 0.3, "as floats"
    assert decide(Gate(max_heldout_loss_increase=0.3), scores(loss_change=change))["passed"]
    assert not decide(Gate(max_heldout_loss_increase=0.3), scores(loss_change=0.300001))["passed"]


def test_the_recipes_in_the_documentation_are_right() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text()
    tasks, judged, gate = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.S))
    assert set(EvaluateConfig.model_validate(tasks["evaluate"]).tasks) == {"reversal", "quick", "maths"}
    asked = EvaluateConfig.model_validate(judged["evaluate"]).reward_models
    assert {*asked.values()} == {*judged["fetch"]["reward_models"]}
    assert PublishConfig.model_validate(gate["publish"]).gate.production.require == "not_worse"
