"""Contrastive preference optimization (arXiv:2401.08417): DPO with a uniform reference, and the chosen answer's
cross-entropy beside it. Needs no reference model.

    -log s(beta (log p(chosen) - log p(rejected))) - sft mean log p(chosen)         (equation 5)
"""

from typing import Any, Literal

from pydantic import Field

from stages.objectives import Batch, LossSums, Objective, Sums
from stages.objectives.dpo import prepare
from stages.stage import StageConfig


class CpoOptions(StageConfig):
    """Settings of contrastive preference optimization."""

    beta: float = Field(default=0.1, gt=0)
    """Scale of the difference of log-probabilities."""
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    """The paper's loss, or SLiC's hinge."""
    sft: float = Field(default=1.0, ge=0)
    """Weight of the chosen answer's cross-entropy, a token."""


def loss(model: Any, options: CpoOptions, batch: Batch) -> LossSums:
    """The summed loss of a prepared batch's pairs as a function."""
    from torch.nn.functional import logsigmoid

    from stages import lm_head, pairs

    head = lm_head.find(model, batch)

    def sums(batch: Batch) -> Sums:
        policy = pairs.answers(head, batch)
        chosen, rejected = options.beta * policy.chosen, options.beta * policy.rejected
        scaled = chosen - rejected
        losses = -logsigmoid(scaled) if options.loss == "sigmoid" else (1 - scaled).relu()
        return {"loss": (losses - options.sft * policy.chosen_mean).sum(), **pairs.measures(chosen, rejected)}

    return sums


OBJECTIVE = Objective(version=1, prepare=prepare, loss=loss, options=CpoOptions, kinds=("preference",), counts="pairs")
