"""Options of objectives and their figures, where a changed line went unnoticed by all other tests."""

import math
from pathlib import Path
from typing import Any

import pytest

from stages import pairs
from stages.identity import Json
from stages.objectives import dpo, find, options_of
from tests.objectives.test_preferences import BETA, alone, model, packed, s  # noqa: F401
from tests.stages.test_heldout import by_hand, measured  # noqa: F401


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("orpo", {"beta": 0.7}),
        ("simpo", {"beta": 1.3, "gamma": 0.4, "sft": 0.6}),
        ("cpo", {"beta": 0.4, "sft": 0.3}),
        ("cpo", {"beta": 0.1, "loss": "hinge", "sft": 0.0}),
    ],
)
def test_options_of_objectives_without_a_reference_count(model: Any, name: str, options: dict[str, Any]) -> None:  # noqa: F811
    batch = packed(reference=False)
    beta, expected, rows = options["beta"], 0.0, alone(model, batch)
    for (c, _, m), (r, _, n) in zip(rows[::2], rows[1::2], strict=True):
        if name == "orpo":
            p, q = math.exp(c / m), math.exp(r / n)
            expected += -math.log(p) - beta * math.log(s(math.log(p / (1 - p)) - math.log(q / (1 - q))))
        elif name == "simpo":
            expected += -math.log(s(beta * c / m - beta * r / n - options["gamma"])) - options["sft"] * c / m
        elif options.get("loss") == "hinge":
            expected += max(0.0, 1 - beta * (c - r))
        else:
            expected += -math.log(s(beta * (c - r))) - options["sft"] * c / m
    objective = find(name)
    prepared = objective.prepare(batch)
    found = objective.loss(model, options_of(name, options), prepared)(prepared)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_discopop_blends_at_its_temperature(model: Any) -> None:  # noqa: F811
    batch = packed()
    expected, rows = 0.0, alone(model, batch)
    for (c, a, _), (r, b, _) in zip(rows[::2], rows[1::2], strict=True):
        d = BETA * ((c - a) - (r - b))
        expected += (1 - s(d / 2.0)) * -math.log(s(d)) + s(d / 2.0) * math.exp(-d)
    prepared = pairs.pick(batch)
    found = dpo.loss(model, dpo.DpoOptions(beta=BETA, loss="discopop", temperature=2.0), prepared)(prepared)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("measured", ["unpaired_preference"], indirect=True)
def test_the_held_out_loss_of_judged_answers_is_that_of_the_good_ones(
    measured: tuple[Path, list[Path], Json],  # noqa: F811
) -> None:
    _, models, scores = measured
    for name, folder in zip(("base", "tuned"), models, strict=True):
        good = by_hand(folder, "unpaired_preference")[::3]
        loss = -sum(total for total, _ in good) / sum(count for _, count in good)
        assert scores["heldout_loss"][name]["value"] == pytest.approx(loss, rel=1e-4)
    assert scores["heldout_loss"]["tokens"] == sum(count for _, count in good)
