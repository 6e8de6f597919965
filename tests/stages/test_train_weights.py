"""Averages and best weights of weights that are split: as of float32 ones, bit for bit."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from stages.train import TrainConfig, adamw
from stages.train.heldout import Looks
from stages.train.weights import Average


def drawn() -> Tensor:
    return torch.randn(7, 5)


def layers() -> tuple[nn.Linear, nn.Linear]:
    """The same weights whole and split."""
    torch.manual_seed(0)
    whole = nn.Linear(5, 7, bias=False)
    halves = copy.deepcopy(whole)
    adamw.split(halves)
    return whole, halves


def test_an_average_of_split_weights_is_that_of_whole_ones() -> None:
    pair = layers()
    averages = [Average(layer, 0.9) for layer in pair]
    for step in range(1, 6):
        value = drawn()
        for layer, average in zip(pair, averages, strict=True):
            adamw.put(layer.weight, value)
            average.after(step)
    assert torch.equal(averages[0].averages["weight"], averages[1].averages["weight"])
    with averages[0].in_place(), averages[1].in_place():
        assert torch.equal(adamw.whole(pair[1].weight), pair[0].weight) and not torch.equal(pair[0].weight, value)
    assert torch.equal(adamw.whole(pair[1].weight), value) and torch.equal(pair[0].weight, value)


def test_the_best_split_weights_come_back_whole() -> None:
    _, layer = layers()
    config = TrainConfig.model_validate({"evaluate_every": 1, "keep": "best"})
    losses = iter([3.0, 1.0, 2.0])
    none: Any = None
    looks = Looks(layer, config, none, 1, 3, lambda: next(losses), None, lambda step, loss: None)
    values = [drawn() for _ in range(3)]
    for step, value in enumerate(values, 1):
        adamw.put(layer.weight, value)
        looks.after(step)
    looks.finish()
    assert torch.equal(adamw.whole(layer.weight), values[1])
