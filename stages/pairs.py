"""Log-probabilities of whole answers in a packed batch: what objectives over judged answers are made of.

    batch = pick(collate(bins))                          # on the CPU
    policy = answers(head, batch)                        # Pairs of [pairs] tensors
    policy.chosen, policy.rejected, policy.chosen_mean   # sums over the answer's tokens, and means
    sums(-head.token_losses(batch), batch)               # [documents], for answers that do not come in pairs

A row of preference data is two documents side by side, the chosen one before the rejected one (see `packing.collate`).
Nothing is padded, and each document is attended to by itself, so a pair costs the tokens it has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages import lm_head

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities (nats) of the trained tokens, added up."""

    chosen: Tensor
    """[pairs]"""
    rejected: Tensor
    """[pairs]"""
    chosen_tokens: Tensor
    """[pairs] How many tokens they are."""
    rejected_tokens: Tensor
    """[pairs]"""

    @property
    def chosen_mean(self) -> Tensor:
        """[pairs] A token."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        """[pairs] A token."""
        return self.rejected / self.rejected_tokens

    def __sub__(self, other: "Pairs") -> "Pairs":
        """Log-ratios of the same answers under two models."""
        chosen, rejected = self.chosen - other.chosen, self.rejected - other.rejected
        return Pairs(chosen, rejected, self.chosen_tokens, self.rejected_tokens)


def pick(batch: Batch) -> dict[str, Any]:
    """As `lm_head.pick`, and `document` [trained], the number of each token's document; `answer_tokens` [documents]
    says how many each has. `reference` [1, tokens], if there, becomes `reference` [trained].

    Every document has a trained token (pack drops rows that have not), and padding stands last.
    """
    picked = lm_head.pick(batch)
    positions = picked["positions"]
    picked["document"] = torch.searchsorted(batch["cu_seq_lens_q"], positions, right=True) - 1
    picked["answer_tokens"] = torch.bincount(picked["document"])
    if "reference" in batch:
        picked["reference"] = batch["reference"][0, 1:][positions]
    return picked


def answers(head: lm_head.Head, batch: Batch) -> Pairs:
    """The answers' log-probabilities under the model."""
    return _paired(-head.token_losses(batch), batch)


def reference(batch: Batch) -> Pairs:
    """The answers' log-probabilities under the model before training, as the batch brings them."""
    return _paired(batch["reference"], batch)


def sums(values: Tensor, batch: Batch) -> Tensor:
    """[documents] The sums over each document's trained tokens of `values` [trained]."""
    return values.new_zeros(len(batch["answer_tokens"])).index_add(0, batch["document"], values)


def _paired(log_probs: Tensor, batch: Batch) -> Pairs:
    tokens, found = batch["answer_tokens"], sums(log_probs, batch)
    assert len(tokens) % 2 == 0, "documents of a preference plan come in pairs"
    return Pairs(found[0::2], found[1::2], tokens[0::2], tokens[1::2])


def measures(chosen_reward: Tensor, rejected_reward: Tensor) -> dict[str, Tensor]:
    """Sums that say how well the two sides are told apart, without gradient."""
    margin = (chosen_reward - rejected_reward).detach()
    return {
        "accuracy": (margin > 0).float().sum(),
        "margin": margin.sum(),
        "chosen_reward": chosen_reward.detach().sum(),
        "rejected_reward": rejected_reward.detach().sum(),
    }
