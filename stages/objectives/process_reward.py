"""A process reward model: whether each step of a solution is right (arXiv:2211.14275, arXiv:2305.20050).

The model reads a solution and chooses between wrong and right at the last token of every step; the loss is the
cross-entropy of that choice, the mean over the steps. The words' head of the model is replaced by one of two numbers,
and what is published is a token classifier: what it says at other tokens means nothing.
"""

from itertools import pairwise
from typing import Any

from pydantic import Field

from stages.objectives import Batch, LossSums, Objective, Sums
from stages.stage import StageConfig


class ProcessRewardOptions(StageConfig):
    """Settings of process reward modelling."""

    wrong_weight: float = Field(default=1.0, gt=0)
    """Weight of wrong steps, above 1 where they are rare."""


def prepare(batch: Batch) -> dict[str, Any]:
    """`labels` and `extra` become `ends` [steps], the last token of each that is whole, and `right` [steps], 0 or 1."""
    import torch

    from stages.steps import judged

    bounds = pairwise(batch["cu_seq_lens_q"].tolist())
    rest = {name: value for name, value in batch.items() if name not in ("labels", "extra")}
    found = zip(bounds, batch["extra"], strict=False)  # padding has no labels
    steps = [(begin + end - 1, right) for (begin, stop), extra in found for end, right in judged(extra, stop - begin)]
    ends, right = torch.tensor(steps, dtype=torch.long).reshape(-1, 2).T
    return {**rest, "ends": ends, "right": right}


def loss(model: Any, options: ProcessRewardOptions, batch: Batch) -> LossSums:
    """The summed loss of a prepared batch's steps as a function."""
    import torch
    from torch.nn.functional import cross_entropy

    from stages import heads

    def sums(batch: Batch) -> Sums:
        choice, right = heads.of(model, batch, batch["ends"]), batch["right"]
        # Made where it is: a copy to the device would wait for it.
        weight = torch.where(torch.arange(2, device=choice.device) == 0, options.wrong_weight, 1.0)
        total = cross_entropy(choice, right, weight=weight, reduction="sum")
        return {"loss": total, "accuracy": (choice.detach().argmax(1) == right).float().sum()}

    return sums


OBJECTIVE = Objective(
    version=2,
    prepare=prepare,
    loss=loss,
    options=ProcessRewardOptions,
    kinds=("stepwise",),
    counts="labels",
    head=2,
)
