"""Split weights put together and apart again, each in one pass over memory: see `stages.train.adamw`, whose `whole` and
`put` compute the same."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["join", "part_"]

BLOCK = 4096
"""Numbers that one program takes."""


@triton.jit
def _join(high, low, gradient, whole, wide, factor, count, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    bits = tl.load(high + at, mask=mask).to(tl.int16, bitcast=True).to(tl.int32) << 16
    bits += tl.load(low + at, mask=mask).to(tl.int32)
    tl.store(whole + at, bits.to(tl.float32, bitcast=True), mask=mask)
    value = tl.load(gradient + at, mask=mask).to(tl.float32)
    if SCALED:
        value *= tl.load(factor)
    tl.store(wide + at, value, mask=mask)


@triton.jit
def _part(whole, high, low, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    bits = tl.load(whole + at, mask=mask).to(tl.int32, bitcast=True)
    upper = (bits + 0x8000) >> 16
    tl.store(high + at, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    tl.store(low + at, (bits - (upper << 16)).to(tl.int16), mask=mask)


def join(high: Tensor, low: Tensor, gradient: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The float32 weight of two halves, and its gradient in float32, times `factor` if there is one."""
    assert high.is_contiguous() and low.is_contiguous(), "the kernel walks through memory"
    gradient = gradient.contiguous()
    whole, wide = (torch.empty(high.shape, dtype=torch.float32, device=high.device) for _ in range(2))
    kernel: Any = _join
    kernel[(triton.cdiv(high.numel(), BLOCK),)](
        high, low, gradient, whole, wide, wide if factor is None else factor, high.numel(),
        SCALED=factor is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return whole, wide


def part_(whole: Tensor, high: Tensor, low: Tensor) -> None:
    """Write a float32 weight into its two halves."""
    kernel: Any = _part
    whole = whole.contiguous()
    kernel[(triton.cdiv(high.numel(), BLOCK),)](whole, high, low, high.numel(), BLOCK=BLOCK, num_warps=8)
