"""Learning rates against closed formulas, and against transformers' schedules a step on."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from stages.train import TrainConfig, schedules


def shares(total: int, **config: Any) -> list[float]:
    share = schedules.multiplier(TrainConfig.model_validate(config), total)
    return [share(step) for step in range(total)]


@pytest.mark.parametrize(
    ("ours", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
def test_without_a_floor_they_are_transformers_schedules_less_their_first_value(ours: str, theirs: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=7, num_training_steps=51)
    expected = []
    for _ in range(50):
        optimizer.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert shares(50, schedule=ours, warmup=7) == pytest.approx(expected)


def test_cosine_ends_at_its_floor() -> None:
    found = shares(100, schedule="cosine", warmup=0, floor=0.1)
    assert found == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * s / 100)) / 2 for s in range(100)])
    assert found[0] == 1.0 and 0.1 < found[-1] < 0.101


def test_wsd_is_stable_and_then_falls_in_a_line() -> None:
    found = shares(100, schedule="wsd", warmup=10, decay=20)
    assert found[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert found[10:80] == [1.0] * 70
    assert found[80:] == pytest.approx([(100 - s) / 21 for s in range(80, 100)])
    assert shares(100, schedule="wsd", warmup=0.1, decay=0.2) == found
    assert shares(100, schedule="wsd", warmup=10, decay=20, floor=0.5)[80:] == pytest.approx(
        [0.5 + 0.5 * (100 - s) / 21 for s in range(80, 100)]
    )


def test_inverse_sqrt_falls_on_the_warmups_time_scale() -> None:
    found = shares(100, schedule="inverse_sqrt", warmup=10)
    assert found[9:] == pytest.approx([math.sqrt(10 / (s + 1)) for s in range(9, 100)])


@pytest.mark.parametrize(("share", "steps", "expected"), [(0.07, 100, 7), (0.14, 50, 7), (1.1, 50, 55)])
def test_a_share_of_steps_is_none_too_many_by_rounding(share: float, steps: int, expected: int) -> None:
    assert share * steps > expected, "as floats"
    assert schedules.steps_in(share, steps) == expected
    assert share > 1 or schedules.steps_of(share, steps) == expected


def test_a_share_of_steps_is_rounded_up() -> None:
    assert [schedules.steps_of(share, 100) for share in (0.0, 1e-12, 0.0701, 0.999)] == [0, 1, 8, 100]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 10])
def test_without_a_warmup_the_first_step_has_the_recipes_rate(schedule: str, total: int) -> None:
    assert shares(total, schedule=schedule, warmup=0)[0] == 1.0


@pytest.mark.parametrize(
    ("total", "settings", "said"),
    [
        (10, {"warmup": 100}, "most is 10 % .* warmup over 100 steps does not fit into 10"),
        (10, {"warmup": 11}, "most is 91 %"),
        (10, {"schedule": "wsd", "warmup": 5, "decay": 8}, "most is 80 % .* over 5 steps and a fall over 8 .* into 10"),
        (10, {"warmup": 10}, None),
        (10, {"warmup": 0}, None),
        (1, {"warmup": 0.03}, None),
        (10, {"schedule": "wsd", "warmup": 2, "decay": 8}, None),
        (10, {"schedule": "wsd", "warmup": 0, "decay": 1}, None),
        (10, {"schedule": "inverse_sqrt", "warmup": 3}, None),
        (10, {"warmup": 0, "lora": {"restart_every": 4, "restart_warmup": 4}}, None),
        (10, {"warmup": 0, "lora": {"restart_every": 10, "restart_warmup": 40}}, None),
    ],
)
def test_a_learning_rate_that_is_never_reached_is_told(total: int, settings: dict[str, Any], said: str | None) -> None:
    found = schedules.unreached(TrainConfig.model_validate(settings), total)
    assert (found is None) == (said is None)
    assert said is None or re.search(said, found or "")
    assert said is None or max(shares(total, **settings)) < 1


def test_restarts_that_follow_one_another_faster_than_they_warm_up_are_told() -> None:
    settings: dict[str, Any] = {"warmup": 0, "lora": {"restart_every": 5}, "schedule": "constant"}
    found = schedules.unreached(TrainConfig.model_validate(settings), 20)
    assert found and "more than 50 % of its learning rate: lora.restart_warmup is 10" in found
    assert max(shares(20, **settings)[5:]) == 0.5


def test_warmup_is_steps_or_a_share_of_them() -> None:
    assert shares(200, warmup=0.03) == shares(200, warmup=6)
    assert shares(200, warmup=1)[0] == 1.0


@given(
    total=st.integers(1, 300),
    schedule=st.sampled_from(["cosine", "linear", "constant", "wsd", "inverse_sqrt"]),
    warmup=st.floats(0, 0.99) | st.integers(1, 400),
    decay=st.floats(0.01, 1) | st.integers(1, 400),
)
def test_no_step_is_wasted_and_none_exceeds_the_recipe(total: int, schedule: str, warmup: float, decay: float) -> None:
    falls = {"decay": decay} if schedule == "wsd" else {}
    assert all(0 < share <= 1 for share in shares(total, schedule=schedule, warmup=warmup, **falls))
