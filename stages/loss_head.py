"""The loss head: cross-entropy of some positions' next tokens, without ever holding the logits of all of them.

    loss = linear_cross_entropy(hidden, weight, positions, targets)     # summed, nats, float32

The head of a language model is its widest layer, so it is computed for the trained positions alone, chunk by chunk, and
each chunk's gradients at once: its logits exist once, are turned into their own gradient in place, and give the
gradients of hidden states and weight by two matrix products. Three products a chunk in all, as without chunks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["chunks", "cross_entropy_", "linear_cross_entropy", "linear_token_losses", "spread"]

CHUNK = 5120
"""Most rows of logits that exist at once: 1.2 GiB in 16 bits at a vocabulary of 128 k."""
LOWERED = 64
"""What float16 rows are divided by in the product that adds them up: of 4,096 rows even 1,000 in each fit then."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropies (nats, float32) of `hidden[positions] @ weight.T` against `targets`.

    `hidden` is [tokens, width], `weight` [vocabulary, width], `positions` and `targets` [trained] int64, no position
    twice. Products are in autocast's dtype where it is on, else in that of `hidden`; softmax and sum in float32.
    """
    return _apply(_LinearCrossEntropy, hidden, weight, positions, targets)


def linear_token_losses(hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """[trained] The same cross-entropies one by one, for objectives that weigh them by what they turn out to be.

    What a token's loss is worth is known only after the forward pass, so the gradient of `weight`, where it trains,
    needs its chunks' logits once more: five products a chunk instead of three.
    """
    return _apply(_LinearTokenLosses, hidden, weight, positions, targets)


def chunks(rows: int) -> Iterator[slice]:
    """Rows in as few parts of at most `CHUNK` as will do, of one size but for the last: a small part of its own would
    read and write the whole gradient of the weight for next to nothing."""
    size = -(-rows // max(-(-rows // CHUNK), 1))
    return (slice(begin, min(begin + size, rows)) for begin in range(0, rows, max(size, 1)))


def _apply(function: Any, hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        found: Tensor = function.apply(hidden, weight.to(hidden.dtype), positions, targets, torch.is_grad_enabled())
    return found


def _in_chunks(
    rows: Tensor, weight: Tensor, targets: Tensor, d_rows: Tensor | None, d_weight: Tensor | None, needed: bool
) -> Tensor:
    """[rows] Losses; the gradients of their sum are written to `d_rows` and `d_weight`, where given."""
    losses = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    buffer = rows.new_empty(min(CHUNK, len(rows)), len(weight))
    if d_weight is not None and (d_weight.dtype != rows.dtype or not len(rows)):
        d_weight.zero_()
    for part in chunks(len(rows)):
        logits = torch.mm(rows[part], weight.T, out=buffer[: len(rows[part])])
        losses[part] = cross_entropy_(logits, targets[part], needed)
        if d_rows is not None:
            torch.mm(logits, weight, out=d_rows[part])
        if d_weight is not None and d_weight.dtype != rows.dtype:
            d_weight.add_(logits.T @ (rows[part] / LOWERED), alpha=LOWERED)
        elif d_weight is not None:
            d_weight.addmm_(logits.T, rows[part], beta=1 if part.start else 0)  # 0 does not even read what is there
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor, learns: bool) -> Tensor:
        for_hidden, for_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        rows = hidden.index_select(0, positions)
        d_rows = torch.empty_like(rows) if for_hidden else None
        # The sum over all rows, not yet divided by their number, may be more than float16 holds.
        wide = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        d_weight = torch.empty_like(weight, dtype=wide) if for_weight else None
        losses = _in_chunks(rows, weight, targets, d_rows, d_weight, for_hidden or for_weight)
        ctx.save_for_backward(d_rows, d_weight, positions)
        ctx.tokens, ctx.dtype = len(hidden), weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        d_rows, d_weight, positions = ctx.saved_tensors
        (factor,) = gradients
        d_hidden = None if d_rows is None else spread(scale_(d_rows, factor), positions, ctx.tokens)
        return d_hidden, None if d_weight is None else scale_(d_weight, factor).to(ctx.dtype), None, None, None


class _LinearTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor, learns: bool) -> Tensor:
        for_hidden, for_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        rows = hidden.index_select(0, positions)
        d_rows = torch.empty_like(rows) if for_hidden else None
        losses = _in_chunks(rows, weight, targets, d_rows, None, for_hidden)
        again = (rows, weight, targets) if for_weight else (None, None, None)
        ctx.save_for_backward(d_rows, positions, *again)
        ctx.tokens = len(hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        d_rows, positions, rows, weight, targets = ctx.saved_tensors
        factors = gradients[0][:, None]
        # Weighed in float32: a weight rounded to 16 bits would be off by the same for the whole row.
        d_hidden = None if d_rows is None else spread((d_rows * factors).to(d_rows.dtype), positions, ctx.tokens)
        d_weight = None
        if weight is not None:
            d_weight = torch.zeros_like(weight)
            for part in chunks(len(rows)):
                logits = rows[part] @ weight.T
                cross_entropy_(logits, targets[part], True)
                d_weight.addmm_(logits.T, (rows[part] * factors[part]).to(rows.dtype))
        return d_hidden, d_weight, None, None, None


def spread(rows: Tensor, positions: Tensor, tokens: int) -> Tensor:
    """[tokens, width] Rows at their positions, zeros elsewhere."""
    return rows.new_zeros(tokens, rows.shape[1]).index_copy_(0, positions, rows)


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """`values`, multiplied in place by a float32 number on their device."""
    if values.is_cuda:
        from stages.kernels.cross_entropy import scale_ as on_a_gpu

        return on_a_gpu(values, factor)
    return values.mul_(factor)


def cross_entropy_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """[rows] The cross-entropy (nats, float32) of each row of `logits` [rows, vocabulary] against `targets` [rows].
    With `gradient`, the logits are overwritten by the gradient of the losses' sum."""
    if logits.is_cuda:
        from stages.kernels.cross_entropy import cross_entropy_ as on_a_gpu

        return on_a_gpu(logits, targets, gradient)
    normalizer = torch.logsumexp(logits.float(), dim=1)
    picked = targets[:, None]
    losses = normalizer - logits.gather(1, picked)[:, 0].float()
    if gradient:
        shares = logits.float().sub_(normalizer[:, None]).exp_()
        logits.copy_(shares.scatter_add_(1, picked, shares.new_full(picked.shape, -1.0)))
    return losses
