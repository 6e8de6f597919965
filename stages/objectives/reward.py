"""A reward model: a number for an answer, fitted to preferences (Bradley and Terry 1952; arXiv:2203.02155, equation 1).

With c and r what the model gives the chosen and the rejected answer, read at their last token, a pair's loss is

    -log s(c - r - m) + centre (c + r)^2

m is the row's own margin, how much better the chosen answer is (arXiv:2307.09288, equation 2); the second term keeps
rewards around zero (arXiv:2312.09244, section 2). The words' head of the model is replaced by one of a single number,
and what is published is a sequence classifier with one label.
"""

from typing import Any

from pydantic import Field

from stages.objectives import Batch, LossSums, Objective, Sums
from stages.stage import StageConfig


class RewardOptions(StageConfig):
    """Settings of reward modelling."""

    margins: bool = True
    """Whether a row's `margin`, where it has one, must be held between its answers."""
    centre: float = Field(default=0.0, ge=0)
    """Weight of the term that keeps rewards around zero; about 0.01."""


def prepare(batch: Batch) -> dict[str, Any]:
    """`labels` and `extra` become `ends` [documents], where each ends, and `margin` [pairs]."""
    import torch

    extra = batch["extra"]
    assert len(extra) % 2 == 0, "documents of a preference plan come in pairs"
    rest = {name: value for name, value in batch.items() if name not in ("labels", "extra")}
    margin = torch.tensor([float(each.get("margin", 0.0)) for each in extra[::2]])
    return {**rest, "ends": batch["cu_seq_lens_q"][1 : len(extra) + 1].long() - 1, "margin": margin}


def loss(model: Any, options: RewardOptions, batch: Batch) -> LossSums:
    """The summed loss of a prepared batch's pairs as a function."""
    from torch.nn.functional import logsigmoid

    from stages import heads, pairs

    def sums(batch: Batch) -> Sums:
        rewards = heads.of(model, batch, batch["ends"])[:, 0]
        chosen, rejected = rewards[0::2], rewards[1::2]
        apart = chosen - rejected - (batch["margin"] if options.margins else 0.0)
        total = (-logsigmoid(apart) + options.centre * (chosen + rejected) ** 2).sum()
        return {"loss": total, **pairs.measures(chosen, rejected)}

    return sums


OBJECTIVE = Objective(
    version=1, prepare=prepare, loss=loss, options=RewardOptions, kinds=("preference",), counts="pairs", head=1
)
