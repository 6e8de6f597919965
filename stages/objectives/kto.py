"""Kahneman–Tversky optimization (arXiv:2402.01306): learning from answers that are each only good or bad.

With r the log-ratio of an answer (its log-probability under the model that trains, minus that under the model before
training), an answer's loss is

    desirable_weight   (1 - s(beta (r - z)))       where it is good
    undesirable_weight (1 - s(beta (z - r)))       where it is bad       (equations 7 and 8)

The reference point z says how far the model has moved anyway: the KL divergence to the model before training, estimated
as max(0, mean r) over prompts with the answers of other rows (`stages.mismatched`), without gradient. Here the mean is
over all the prompts of a step, so that it does not depend on the micro-batch. The loss is the mean over the answers.
"""

from typing import Any

from pydantic import Field

from stages.objectives import Batch, LossSums, Objective, Sums
from stages.stage import StageConfig


class KtoOptions(StageConfig):
    """Settings of Kahneman–Tversky optimization."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the one before training: the smaller, the further it may move."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of good answers. With many more of one kind, let this weight times the good ones be 1 to 4/3 of the other
    times the bad ones."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of bad answers."""


def prepare(batch: Batch) -> dict[str, Any]:
    """As `stages.pairs.pick`, for the answers and for those of other rows; and `good` [documents], 1 or -1."""
    import torch

    from stages import pairs

    picked = pairs.pick({name: value for name, value in batch.items() if name not in ("extra", "mismatched")})
    picked["good"] = torch.tensor([1.0 if each["label"] else -1.0 for each in batch["extra"]])
    if "mismatched" in batch:
        picked["mismatched"] = pairs.pick(batch["mismatched"])
    return picked


def baseline(model: Any, options: KtoOptions, batch: Batch) -> LossSums:
    """The summed log-ratios of other rows' answers."""
    from stages import lm_head, pairs

    head = lm_head.find(model, batch)

    def sums(batch: Batch) -> Sums:
        other = batch["mismatched"]
        return {"kl": pairs.sums(-head.token_losses(other) - other["reference"], other).sum()}

    return sums


def loss(model: Any, options: KtoOptions, batch: Batch) -> LossSums:
    """The summed loss of a prepared batch's answers as a function."""
    import torch

    from stages import lm_head, pairs

    head = lm_head.find(model, batch)

    def sums(batch: Batch) -> Sums:
        ratios = pairs.sums(-head.token_losses(batch) - batch["reference"], batch)
        kl = batch["baseline"]["kl"].clamp(min=0) if "baseline" in batch else torch.zeros_like(ratios[0])
        good = batch["good"]
        margin = options.beta * good * (ratios - kl)
        weight = torch.where(good > 0, options.desirable_weight, options.undesirable_weight)
        return {
            "loss": (weight * (1 - margin.sigmoid())).sum(),
            "accuracy": (margin.detach() > 0).float().sum(),
            "margin": margin.detach().sum(),
            "kl": kl.detach() * len(ratios),
        }

    return sums


OBJECTIVE = Objective(
    version=2,
    prepare=prepare,
    loss=loss,
    baseline=baseline,
    options=KtoOptions,
    kinds=("unpaired_preference",),
    counts="documents",
    reference=True,
)
