"""Looks at the held-out loss while training, where a changed line went unnoticed by all other tests."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packing.collate import PackedBins
from stages.objectives import find
from stages.train import TrainConfig
from stages.train.heldout import Looks, look_of
from stages.train.ranks import Group
from stages.train.weights import Average
from tests.stages import tiny


def looks(losses: list[float], layer: nn.Module, average: Average | None = None, **config: Any) -> Looks:
    """Looks at every other step of five that find these losses."""
    given, none = iter(losses), None
    made = TrainConfig.model_validate({"evaluate_every": 2, **config})
    optimizer: Any = none
    return Looks(layer, made, optimizer, 2, 5, lambda: next(given), average, lambda step, loss: None)


def trained(found: Looks, layer: nn.Linear, steps: range = range(1, 6)) -> list[int]:
    """Steps that give the weight their number; the steps after which training was to stop."""
    stopped = []
    for step in steps:
        with torch.no_grad():
            layer.weight.fill_(step)
        found.after(step)
        stopped += [step] if found.stop else []
    return stopped


def test_the_last_step_is_looked_at_whatever_the_interval() -> None:
    """The weights that are written would have no figure."""
    layer = nn.Linear(1, 1, bias=False)
    found = looks([3.0, 2.0, 1.0], layer, keep="best")
    trained(found, layer)
    assert [each["step"] for each in found.record["looks"]] == [2, 4, 5]
    assert (found.record["best_step"], found.record["written_step"], found.record["stopped_early"]) == (5, 5, False)


@pytest.mark.parametrize(
    ("losses", "patience", "stopped"),
    [
        ([1.0, 2.0, 2.0], 1, [4, 5]),
        ([1.0, 1.0, 1.0], 1, [4, 5]),
        ([1.0, 2.0, 2.0], 2, [5]),
        ([1.0, 2.0, 0.5], 2, []),
        ([math.nan, 2.0, 1.0], 1, []),
        ([1.0, math.nan, math.nan], 2, [5]),
    ],
)
def test_patience_is_a_number_of_looks_that_found_nothing_better(
    losses: list[float], patience: int, stopped: list[int]
) -> None:
    layer = nn.Linear(1, 1, bias=False)
    assert trained(looks(losses, layer, patience=patience), layer) == stopped


@pytest.mark.parametrize(
    ("losses", "kept"),
    [([2.0, 1.0, 1.0], 4), ([math.nan, 3.0, math.nan], 4), ([1.0, 2.0, 3.0], 2), ([math.nan] * 3, 5)],
)
def test_the_first_of_the_best_weights_is_kept_and_no_number_is_ever_best(losses: list[float], kept: int) -> None:
    layer = nn.Linear(1, 1, bias=False)
    found = looks(losses, layer, keep="best")
    trained(found, layer)
    found.finish()
    assert layer.weight.item() == kept == found.record["written_step"]


def test_the_weights_of_the_last_step_are_written_unless_the_best_are_asked_for() -> None:
    layer = nn.Linear(1, 1, bias=False)
    found = looks([1.0, 2.0, 3.0], layer)
    trained(found, layer)
    found.finish()
    assert layer.weight.item() == 5 == found.record["written_step"] and found.record["best_step"] == 2


def test_whoever_goes_on_knows_the_best_weights_and_how_long_they_are_ago() -> None:
    layer = nn.Linear(1, 1, bias=False)
    before = looks([1.0, 2.0], layer, keep="best", patience=2)
    assert trained(before, layer, range(1, 5)) == []
    again = nn.Linear(1, 1, bias=False)
    after = looks([1.5], again, keep="best", patience=2)
    after.load_state_dict(before.state_dict())
    assert trained(after, again, range(5, 6)) == [5]
    after.finish()
    assert again.weight.item() == 2
    over = looks([], nn.Linear(1, 1, bias=False), keep="best", patience=2)
    over.load_state_dict(after.state_dict())
    assert over.stop, "what has stopped is over"


def test_averages_are_what_is_looked_at_and_kept() -> None:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
    average = Average(layer, 0.5)
    seen: list[float] = []

    def look() -> float:
        seen.append(layer.weight.item())
        return 1.0

    found = looks([], layer, average, keep="best")
    found.look = look
    for step in range(1, 3):
        with torch.no_grad():
            layer.weight.fill_(4.0)
        average.after(step)
        found.after(step)
    assert seen == [3.0] and layer.weight.item() == 4.0, "training goes on with its own weights"
    found.finish()
    assert layer.weight.item() == 3.0


class Told(Group):
    """A rank that notes what it adds to the others'."""

    def sum(self, tensor: Tensor) -> Tensor:
        told.append(tensor.clone())
        return tensor


told: list[Tensor] = []


def test_ranks_measure_each_held_out_sequence_once_and_without_dropout(tmp_path: Path) -> None:
    made = tiny.plan(tmp_path, tiny.documents(20), heldout=5)
    bins, layer = PackedBins(None, made["plan"]), nn.Linear(1, 1).train()

    def loss(batch: Any) -> dict[str, Tensor]:
        assert not layer.training and not torch.is_grad_enabled()
        return {"loss": batch["input_ids"].sum().double()}

    def measured(group: Group) -> float:
        config = TrainConfig.model_validate({"evaluate_every": 1})
        look = look_of(config, find("sft"), bins, layer, loss, None, "cpu", False, group, False)
        assert look is not None
        found = look()
        assert layer.training, "as it was"
        return found

    alone = measured(Group())
    told.clear()
    for rank in range(3):
        measured(Told(rank, 3))
    assert sum(told).tolist()[-1] == bins.trained.sum(), "each counts once"  # type: ignore[union-attr]
    total, count = sum(told).tolist()  # type: ignore[union-attr]
    assert total / count == pytest.approx(alone)
    assert total == sum(int(bins[number].ids.sum()) for number in range(5))
