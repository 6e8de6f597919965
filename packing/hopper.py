"""Causal attention within packed documents as one operation of torch's library, with kernels of our own for Hopper.

torch's kernel is a flash-attn 2 of before Hopper; on an H200 these (`packing.hopper_kernels`, in Triton, which comes
with torch) take 0.46 to 0.68 of its time on packed chats with four query heads to one of keys, and need no package.
`regrow::hopper_attention` is left whole by torch.compile.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["attention", "fits", "runs_on"]

SIZES = (64, 128)
"""Heads that the kernels' blocks fit."""
WASTE = 0.25
"""How much of a block may stay empty, because query heads come in groups that are no power of two."""
LARGEST_GROUP = 32
HOPPER = 9
"""The generation of GPUs that the blocks were measured on."""


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether the kernels are for GPUs of this compute capability."""
    return capability[0] == HOPPER and torch.version.hip is None  # AMD counts its own generations


def fits(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernels take such heads: [1, heads, T, size] each, as transformers has them."""
    size, group = query.shape[-1], query.shape[1] // keys.shape[1]
    padded = 1 << (group - 1).bit_length()
    return size in SIZES and values.shape[-1] == size and (1 - WASTE) * padded <= group <= LARGEST_GROUP


@torch.library.custom_op("regrow::hopper_attention", mutates_args=())
def attention(
    query: Tensor, keys: Tensor, values: Tensor, boundaries: Tensor, sinks: Tensor | None, scaling: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """[T, heads, size] Causal attention within each document; and for the backward pass the logarithms of the sums of
    weights [T, heads], and which tokens each sees, and is seen by, int32 [T].

    `query` is [T, heads, size], `keys` and `values` may have fewer heads; `boundaries` int32 [documents + 1] begin with
    0 and end with T; a `window` of w lets a token see itself and the w - 1 before it; `sinks` [heads] are scores that
    take their share of the softmax and give nothing.
    """
    from packing import hopper_kernels

    lows, highs = hopper_kernels.limits(boundaries.contiguous(), len(query), window)
    sinks = None if sinks is None else sinks.contiguous()
    query, keys, values = (_in_rows(each) for each in (query, keys, values))
    return *hopper_kernels.forward(query, keys, values, sinks, lows, scaling), lows, highs


@attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, ...]:
    limits = (query.new_empty(query.shape[0], dtype=torch.int32) for _ in range(2))
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32), *limits


@torch.library.custom_op("regrow::hopper_attention_backward", mutates_args=())
def _gradients(
    d_out: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, logs: Tensor, lows: Tensor,
    highs: Tensor, sinks: Tensor | None, scaling: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients by query, keys, values, and by sinks if there are any."""
    from packing import hopper_kernels

    query, keys, values = (_in_rows(each) for each in (query, keys, values))
    *found, shifts = hopper_kernels.backward(d_out.contiguous(), query, keys, values, out, logs, lows, highs, scaling)
    if sinks is not None:
        share = torch.exp2(sinks.float() * hopper_kernels.LOG2_E - logs)
        found.append(-(share * shifts).sum(0).to(sinks.dtype))
    return found


@_gradients.register_fake
def _(
    d_out: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, logs: Tensor, lows: Tensor,
    highs: Tensor, sinks: Tensor | None, *_: Any,
) -> list[Tensor]:  # fmt: skip
    return [each.new_empty(each.shape) for each in (query, keys, values, sinks) if each is not None]


def _in_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, keys, values, _, sinks, ctx.scaling, _ = inputs
    ctx.save_for_backward(query, keys, values, *output, sinks)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    by_query, by_keys, by_values, *by_sinks = _gradients(d_out, *ctx.saved_tensors, ctx.scaling)
    return by_query, by_keys, by_values, None, by_sinks[0] if by_sinks else None, None, None


attention.register_autograd(_backward, setup_context=_keep)
