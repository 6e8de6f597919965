"""Simple preference optimization (arXiv:2405.14734): answers are compared by their log-probability a token, and the
chosen one must win by a margin. Needs no reference model.

    -log s(beta (mean log p(chosen) - mean log p(rejected)) - gamma)                (equation 6)
"""

from typing import Any

from pydantic import Field

from stages.objectives import Batch, LossSums, Objective, Sums
from stages.objectives.dpo import prepare
from stages.stage import StageConfig


class SimpoOptions(StageConfig):
    """Settings of simple preference optimization."""

    beta: float = Field(default=2.0, gt=0)
    """Scale of the reward."""
    gamma: float = Field(default=1.0, ge=0)
    """Margin by which the chosen answer's reward must exceed the other's."""
    sft: float = Field(default=0.0, ge=0)
    """Weight of the chosen answer's cross-entropy a token, added to keep the model's wording."""


def loss(model: Any, options: SimpoOptions, batch: Batch) -> LossSums:
    """The summed loss of a prepared batch's pairs as a function."""
    from torch.nn.functional import logsigmoid

    from stages import lm_head, pairs

    head = lm_head.find(model, batch)

    def sums(batch: Batch) -> Sums:
        policy = pairs.answers(head, batch)
        chosen, rejected = options.beta * policy.chosen_mean, options.beta * policy.rejected_mean
        losses = -logsigmoid(chosen - rejected - options.gamma) - options.sft * policy.chosen_mean
        return {"loss": losses.sum(), **pairs.measures(chosen, rejected)}

    return sums


OBJECTIVE = Objective(
    version=1, prepare=prepare, loss=loss, options=SimpoOptions, kinds=("preference",), counts="pairs"
)
