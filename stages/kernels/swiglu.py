"""silu(gate) * up, where gate and up each still lack the product of their adapter: added here, in registers.

On the way back so is what the adapter of the next layer adds to the gradient, and while all of it is in registers, the
gradients of adapters that are sums over rows are summed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

ROWS, COLUMNS = 16, 128
"""A tile, for four warps: larger ones leave too few programs on a multiprocessor to hide the wait for memory."""
PROGRAMS = 1024
"""At least so many at once on the way back: each sums over its share of the rows."""
SUMMED_RANK = 64
"""Up to this rank sums fit into registers, of half as many columns where it is above 16."""
VARYING = ["height", "steps"]
"""Numbers that differ from one expert to another: Triton would compile a kernel again for those that 16 divides."""


@triton.jit
def _whole(out, reduced, b, rows, columns, in_rows, in_columns, stride, reduced_stride, rank, RANK: tl.constexpr):
    """[ROWS, COLUMNS] A tile of out [rows, width] + reduced [rows, rank] b [width, rank]'; and its mask."""
    ranks = tl.arange(0, RANK)
    mask = in_rows[:, None] & in_columns[None, :]
    at = rows[:, None] * reduced_stride + ranks[None, :]
    left = tl.load(reduced + at, in_rows[:, None] & (ranks < rank)[None, :], 0.0)
    right = tl.load(b + columns[None, :] * rank + ranks[:, None], in_columns[None, :] & (ranks < rank)[:, None], 0.0)
    tile = tl.load(out + rows[:, None].to(tl.int64) * stride + columns[None, :], mask, 0.0).to(tl.float32)
    return tile + tl.dot(left, right, out_dtype=tl.float32), mask


@triton.jit(do_not_specialize=VARYING)
def _forward(
    gate, up, reduced_gate, reduced_up, b_gate, b_up, out, height, width, stride, reduced_stride, rank,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < height, columns < width
    where = (rows, columns, in_rows, in_columns, stride, reduced_stride, rank)
    g, mask = _whole(gate, reduced_gate, b_gate, *where, RANK)
    u, mask = _whole(up, reduced_up, b_up, *where, RANK)
    product = g * tl.sigmoid(g) * u
    tl.store(out + rows[:, None].to(tl.int64) * width + columns[None, :], product.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=VARYING)
def _backward(
    d_out, gate, up, reduced_gate, reduced_up, reduced_out, b_gate, b_up, a_out, d_gate, d_up, sums,
    height, width, stride, reduced_stride, rank, rank_out, steps,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    in_columns, in_rank, in_rank_out = columns < width, ranks < rank, ranks < rank_out
    across = columns[None, :] * rank + ranks[:, None]
    right_gate = tl.load(b_gate + across, in_columns[None, :] & in_rank[:, None], 0.0)
    right_up = tl.load(b_up + across, in_columns[None, :] & in_rank[:, None], 0.0)
    factor = ranks[:, None] * width + columns[None, :]
    right_out = tl.load(a_out + factor, in_columns[None, :] & in_rank_out[:, None], 0.0)
    by_gate = tl.zeros((RANK, COLUMNS), tl.float32)
    by_up = tl.zeros((RANK, COLUMNS), tl.float32)
    by_out = tl.zeros((RANK, COLUMNS), tl.float32)
    for step in tl.range(0, steps, num_stages=2):
        rows = (tl.program_id(1) * steps + step) * ROWS + tl.arange(0, ROWS)
        in_rows = rows < height
        mask = in_rows[:, None] & in_columns[None, :]
        left = rows[:, None] * reduced_stride + ranks[None, :]
        left_gate = tl.load(reduced_gate + left, in_rows[:, None] & in_rank[None, :], 0.0)
        left_up = tl.load(reduced_up + left, in_rows[:, None] & in_rank[None, :], 0.0)
        left_at = rows[:, None] * rank_out + ranks[None, :]
        left_out = tl.load(reduced_out + left_at, in_rows[:, None] & in_rank_out[None, :], 0.0)
        at = rows[:, None].to(tl.int64) * stride + columns[None, :]
        at_out = rows[:, None].to(tl.int64) * width + columns[None, :]
        g = tl.load(gate + at, mask, 0.0).to(tl.float32) + tl.dot(left_gate, right_gate, out_dtype=tl.float32)
        u = tl.load(up + at, mask, 0.0).to(tl.float32) + tl.dot(left_up, right_up, out_dtype=tl.float32)
        d = tl.load(d_out + at_out, mask, 0.0).to(tl.float32) + tl.dot(left_out, right_out, out_dtype=tl.float32)
        share = tl.sigmoid(g)
        by_g = (d * u * share * (1 + g * (1 - share))).to(d_gate.dtype.element_ty)
        by_u = (d * g * share).to(d_up.dtype.element_ty)
        product = (g * share * u).to(d_out.dtype.element_ty)
        tl.store(d_gate + at, by_g, mask)
        tl.store(d_up + at, by_u, mask)
        if SUMS:
            by_gate += tl.dot(tl.trans(left_gate), by_g, out_dtype=tl.float32)
            by_up += tl.dot(tl.trans(left_up), by_u, out_dtype=tl.float32)
            by_out += tl.dot(tl.trans(left_out), product, out_dtype=tl.float32)
        else:
            tl.store(d_out + at_out, product, mask)
    if SUMS:
        sum_at = (tl.program_id(1) * 3 * RANK + ranks[:, None]) * width + columns[None, :]
        tl.store(sums + sum_at, by_gate, in_columns[None, :])
        tl.store(sums + RANK * width + sum_at, by_up, in_columns[None, :])
        tl.store(sums + 2 * RANK * width + sum_at, by_out, in_columns[None, :])


def _padded(rank: int) -> int:
    """What a product in registers takes at least, and only powers of two of."""
    padded: int = triton.next_power_of_2(rank)
    return max(16, padded)


def forward(both: Tensor, reduced: Tensor, b: Sequence[Tensor]) -> Tensor:
    """[rows, width] The product, for gate beside up [rows, 2 * width], what they lack as a product of `reduced`
    [rows, 2 * rank], likewise beside one another, and each b [width, rank]."""
    height, width, rank = len(both), both.shape[1] // 2, b[0].shape[1]
    out = both.new_empty(height, width)
    kernel: Any = _forward
    kernel[(triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS))](
        *both.chunk(2, 1), *reduced.chunk(2, 1), *b, out, height, width, both.stride(0), reduced.stride(0), rank,
        RANK=_padded(rank), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


def backward(
    d_out: Tensor, both: Tensor, reduced: Tensor, b: Sequence[Tensor], reduced_out: Tensor, a_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by the whole gate and up beside one another [rows, 2 * width], by each b [width, rank], and
    `reduced_out`' out [rank_out, width].

    The gradient by out = silu(gate) * up is d_out + reduced_out a_out, for `d_out` [rows, width], which is overwritten,
    `reduced_out` [rows, rank_out] and `a_out` [rank_out, width], all contiguous.
    """
    (height, width), rank, rank_out = d_out.shape, b[0].shape[1], len(a_out)
    d_both = torch.empty_like(both)
    if not height:  # an expert that no token went to
        return d_both, torch.zeros_like(b[0]), torch.zeros_like(b[1]), torch.zeros_like(a_out)
    padded = _padded(max(rank, rank_out))
    columns = COLUMNS if padded <= 16 else COLUMNS // 2
    across, down = triton.cdiv(width, columns), triton.cdiv(height, ROWS)
    steps = triton.cdiv(down, min(down, triton.cdiv(PROGRAMS, across)))
    shares = triton.cdiv(down, steps)
    summed = padded <= SUMMED_RANK
    sums = d_out.new_empty((shares, 3, padded, width) if summed else 0, dtype=torch.float32)
    kernel: Any = _backward
    kernel[(across, shares)](
        d_out, *both.chunk(2, 1), *reduced.chunk(2, 1), reduced_out, *b, a_out, *d_both.chunk(2, 1), sums,
        height, width, both.stride(0), reduced.stride(0), rank, rank_out, steps,
        RANK=padded, ROWS=ROWS, COLUMNS=columns, SUMS=summed, num_warps=4,
    )  # fmt: skip
    if not summed:  # `d_out` now holds out
        by_gate, by_up = (half.T @ by for half, by in zip(d_both.chunk(2, 1), reduced.chunk(2, 1), strict=True))
        return d_both, by_gate, by_up, reduced_out.T @ d_out
    by_gate, by_up, by_out = sums.sum(0).to(d_out.dtype)
    return d_both, by_gate[:rank].T.contiguous(), by_up[:rank].T.contiguous(), by_out[:rank_out].clone()
