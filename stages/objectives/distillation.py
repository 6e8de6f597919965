"""Knowledge distillation from a teacher's cached distributions (arXiv:1503.02531).

`score` keeps, for every token, the `top_k` likeliest tokens by the teacher and their log-probabilities. With p the
teacher's and q the model's probability of these, and all others taken together as one more token, a token's loss is

    sum p (log p - log q) + cross_entropy * -log q(the data's token)

which is the forward KL divergence of the two distributions so coarsened: never more than that of the whole ones, and
zero only where they agree on every token kept. The mean is over the trained tokens of a step. The teacher is
`fetch.teacher`, or the model before training: then the first term holds a model to where it started while the second
teaches it something (learning without forgetting, arXiv:1606.09282).
"""

from typing import Any

from pydantic import Field

from stages.objectives import Batch, LossSums, Objective, Sums
from stages.stage import StageConfig


class DistillationOptions(StageConfig):
    """Settings of distillation."""

    divergence: float = Field(default=1.0, gt=0)
    """Weight of the divergence from the teacher."""
    cross_entropy: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy of the data's own tokens."""


def prepare(batch: Batch) -> dict[str, Any]:
    """As `stages.lm_head.pick`, and `top_ids` and `top_log_probs` [trained, k] of the tokens that train."""
    from stages import lm_head

    picked = lm_head.pick(batch)
    for name in ("top_ids", "top_log_probs"):
        picked[name] = batch[name][0, 1:][picked["positions"]]
    return picked


def loss(model: Any, options: DistillationOptions, batch: Batch) -> LossSums:
    """The summed loss of a prepared batch's trained tokens as a function."""
    import torch

    from stages import lm_head

    head = lm_head.find(model, batch)

    def with_rest(log_probs: torch.Tensor) -> torch.Tensor:
        """[tokens, k + 1] And of all other tokens together."""
        rest = torch.log1p(-log_probs.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))
        return torch.cat([log_probs, rest], dim=1)

    def sums(batch: Batch) -> Sums:
        ids = torch.cat([batch["top_ids"], batch["targets"][:, None]], dim=1)
        found = head.log_probs(batch, ids)
        ours, theirs = with_rest(found[:, :-1]), with_rest(batch["top_log_probs"])
        divergence = (theirs.exp() * (theirs - ours)).sum()
        cross_entropy = -found[:, -1].sum()
        total = options.divergence * divergence + options.cross_entropy * cross_entropy
        return {"loss": total, "divergence": divergence.detach(), "cross_entropy": cross_entropy.detach()}

    return sums


OBJECTIVE = Objective(version=1, prepare=prepare, loss=loss, options=DistillationOptions, teacher=True)
