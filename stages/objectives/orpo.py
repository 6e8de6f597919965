"""Odds ratio preference optimization (arXiv:2403.07691): supervised fine-tuning on the chosen answer that also pushes
the odds of the rejected one down. Needs no reference model.

With p the geometric mean of an answer's token probabilities and odds(p) = p / (1 - p), a pair's loss is

    -log p(chosen) - beta log s(log odds(chosen) - log odds(rejected))          (equations 6 and 7)
"""

from typing import Any

from pydantic import Field

from stages.objectives import Batch, LossSums, Objective, Sums
from stages.objectives.dpo import prepare
from stages.stage import StageConfig


class OrpoOptions(StageConfig):
    """Settings of odds ratio preference optimization."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio's term; the paper's lambda."""


def loss(model: Any, options: OrpoOptions, batch: Batch) -> LossSums:
    """The summed loss of a prepared batch's pairs as a function."""
    import torch
    from torch.nn.functional import logsigmoid

    from stages import lm_head, pairs

    head = lm_head.find(model, batch)

    def log_odds(mean: torch.Tensor) -> torch.Tensor:
        return mean - torch.log(-torch.expm1(mean.clamp(max=-1e-7)))

    def sums(batch: Batch) -> Sums:
        policy = pairs.answers(head, batch)
        odds = log_odds(policy.chosen_mean) - log_odds(policy.rejected_mean)
        rewards = options.beta * policy.chosen_mean, options.beta * policy.rejected_mean
        total = (-policy.chosen_mean - options.beta * logsigmoid(odds)).sum()
        return {"loss": total, "log_odds_ratio": odds.detach().sum(), **pairs.measures(*rewards)}

    return sums


OBJECTIVE = Objective(version=1, prepare=prepare, loss=loss, options=OrpoOptions, kinds=("preference",), counts="pairs")
