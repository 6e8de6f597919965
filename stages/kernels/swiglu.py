"""silu(gate) * up, where gate and up each still lack the product of their adapter: added here, in registers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

ROWS, COLUMNS = 64, 128


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


@triton.jit
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


@triton.jit
def _backward(
    d_out, gate, up, reduced_gate, reduced_up, b_gate, b_up, d_gate, d_up, height, width, stride, reduced_stride, rank,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < height, columns < width
    where = (rows, columns, in_rows, in_columns, stride, reduced_stride, rank)
    g, mask = _whole(gate, reduced_gate, b_gate, *where, RANK)
    u, mask = _whole(up, reduced_up, b_up, *where, RANK)
    d = tl.load(d_out + rows[:, None].to(tl.int64) * width + columns[None, :], mask, 0.0).to(tl.float32)
    share = tl.sigmoid(g)
    at = rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(d_gate + at, (d * u * share * (1 + g * (1 - share))).to(d_gate.dtype.element_ty), mask)
    tl.store(d_up + at, (d * g * share).to(d_up.dtype.element_ty), mask)


def _launch(kernel: Any, tensors: list[Tensor], both: Tensor, reduced: Tensor, rank: int) -> None:
    height, width = both.shape[0], both.shape[1] // 2
    grid = (triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS))
    sizes = (height, width, both.stride(0), reduced.stride(0), rank)
    padded = max(16, triton.next_power_of_2(rank))
    kernel[grid](*tensors, *sizes, RANK=padded, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8)


def forward(both: Tensor, reduced: Tensor, b: tuple[Tensor, Tensor]) -> Tensor:
    """[rows, width] The product, for gate beside up [rows, 2 * width], what they lack as a product of `reduced`
    [rows, 2 * rank], likewise beside one another, and each b [width, rank]."""
    out = both.new_empty(len(both), both.shape[1] // 2)
    _launch(_forward, [*both.chunk(2, 1), *reduced.chunk(2, 1), *b, out], both, reduced, b[0].shape[1])
    return out


def backward(d_out: Tensor, both: Tensor, reduced: Tensor, b: tuple[Tensor, Tensor]) -> Tensor:
    """[rows, 2 * width] The gradients by the whole gate and the whole up, beside one another."""
    d_both = torch.empty_like(both)
    tensors = [d_out, *both.chunk(2, 1), *reduced.chunk(2, 1), *b, *d_both.chunk(2, 1)]
    _launch(_backward, tensors, both, reduced, b[0].shape[1])
    return d_both
