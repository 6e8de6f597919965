"""A slower training is told, and only where it compares."""

import pytest

from flows.throughput import slower

BEFORE = {"device_name": "NVIDIA H200", "ranks": 1, "model_flops_per_second": 500e12, "tokens_per_second": 11000.0}


def test_a_training_that_lost_a_fifth_of_its_speed_says_so() -> None:
    said = slower(BEFORE, {**BEFORE, "model_flops_per_second": 400e12, "tokens_per_second": 8800.0})
    assert said is not None and "by 20%: 400 TFLOP/s (8,800 tokens/s), before 500 (11,000)" in said


@pytest.mark.parametrize(
    "now", [{"model_flops_per_second": 460e12}, {"ranks": 2}, {"device_name": "cpu"}], ids=["noise", "ranks", "device"]
)
def test_noise_and_other_machines_say_nothing(now: dict[str, object]) -> None:
    assert slower(BEFORE, {**BEFORE, "model_flops_per_second": 400e12, **now}) is None
    assert slower(None, BEFORE) is None


def test_trainings_on_completions_have_nothing_to_compare() -> None:
    facts = {"device": "cuda", "completions_per_second": 400.0}
    assert slower(facts, {**facts, "completions_per_second": 40.0}) is None
