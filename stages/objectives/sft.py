"""Supervised fine-tuning: the cross-entropy of the trained tokens, each given what stands before it in its document.

The mean is over the trained tokens of a whole step. `loss: dft` weighs each token's loss by the probability that the
model gives it, without a gradient through the weight (dynamic fine-tuning, arXiv:2508.05629).
"""

from typing import Any, Literal

from stages.objectives import Batch, LossSums, Objective, Sums
from stages.stage import StageConfig


class SftOptions(StageConfig):
    """Settings of supervised fine-tuning."""

    loss: Literal["nll", "dft"] = "nll"
    """Plain cross-entropy, or each token's weighed by its own probability."""


def prepare(batch: Batch) -> dict[str, Any]:
    """`labels` become `positions` and `targets`; see `stages.lm_head.pick`."""
    from stages import lm_head

    return lm_head.pick(batch)


def loss(model: Any, options: SftOptions, batch: Batch) -> LossSums:
    """The summed loss (nats, float32) of a prepared batch as a function."""
    from stages import lm_head

    head = lm_head.find(model, batch)

    def sums(batch: Batch) -> Sums:
        if options.loss == "nll":
            return {"loss": head.loss(batch)}
        losses = head.token_losses(batch)
        plain = losses.detach()
        return {"loss": ((-plain).exp() * losses).sum(), "cross_entropy": plain.sum()}

    return sums


OBJECTIVE = Objective(version=1, prepare=prepare, loss=loss, options=SftOptions)
