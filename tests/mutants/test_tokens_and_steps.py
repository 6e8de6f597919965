"""Tokens across texts, and AdamW's steps, where a changed line went unnoticed by all other tests."""

import json

import pytest
import torch
from torch import nn

from stages.encoding import load as load_encoder
from stages.marks import ORIGIN_CONTENT, TRAIN_NO, TRAIN_YES
from stages.rendering import Rendered, Span
from stages.train.adamw import SplitAdamW, split, whole
from tests.stages.test_tokenize import byte_level, encoded
from tests.stages.test_train_adamw import SETTINGS, layers


def test_a_token_of_three_texts_is_not_learned_when_the_last_must_not_be() -> None:
    document = json.loads(byte_level().to_str())
    document["model"]["vocab"]["hix"] = len(document["model"]["vocab"])
    document["model"]["merges"].append(["hi", "x"])
    parts = [("h", TRAIN_YES), ("i", TRAIN_YES), ("x", TRAIN_NO)]
    spans = [Span(at, at + 1, ORIGIN_CONTENT, 0, "user", train) for at, (_, train) in enumerate(parts)]
    [tokens], [bounds] = encoded(load_encoder(json.dumps(document), []), [Rendered("hix", spans, [])])
    assert len(tokens) == 1 and bounds == [(0, 0), (0, 0), (0, 1)]


def test_each_step_rounds_moments_by_other_bits() -> None:
    weight = nn.Parameter(torch.zeros(1 << 13))
    optimizer = SplitAdamW([weight], lr=1e-3, betas=(0.9, 0.999), moments="bfloat16")
    for _ in range(30):
        weight.grad = torch.full_like(weight, 0.1)
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"].float()
    assert second.std() < 0.02 * second.mean(), "no number is always rounded the same way"


def test_a_weight_that_begins_later_counts_its_own_steps() -> None:
    ours, theirs = layers(), layers()
    split(ours)
    optimizers = [
        (ours, SplitAdamW(ours.parameters(), **SETTINGS)),
        (theirs, torch.optim.AdamW(theirs.parameters(), **SETTINGS)),
    ]
    for model, optimizer in optimizers:
        for number in range(8):
            random = torch.Generator().manual_seed(number)
            for place, parameter in enumerate(model.parameters()):
                gradient = torch.randn(parameter.shape, generator=random).bfloat16()
                parameter.grad = gradient.to(parameter.dtype) if number >= 3 or place % 2 else None
            optimizer.step()
    for our, their, old in zip(ours.parameters(), theirs.parameters(), layers().parameters(), strict=True):
        assert (whole(our) - their).norm() < 1e-4 * (their - old).norm() + 1e-6 * their.norm()


def test_a_short_gradient_is_not_made_longer_and_a_long_one_is_cut() -> None:
    for size, factor in ((0.1, 1.0), (10.0, 0.1)):
        weight = nn.Parameter(torch.zeros(4))
        weight.grad = torch.tensor([size, 0.0, 0.0, 0.0])
        optimizer = SplitAdamW([weight])
        assert optimizer.clip(1.0).item() == pytest.approx(size)
        assert optimizer.factor is not None and optimizer.factor.item() == pytest.approx(factor, rel=1e-5)
