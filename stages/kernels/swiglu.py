"""silu(gate) * up, where gate and up each still lack the product of their adapter: added here, in registers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

ROWS, COLUMNS = 64, 128


@triton.jit
def _whole(out, reduced, b, rows, columns, in_rows, in_columns, width, rank, RANK: tl.constexpr):
    """[ROWS, COLUMNS] A tile of out [rows, width] + reduced [rows, rank] b [width, rank]'; and its mask."""
    ranks = tl.arange(0, RANK)
    mask = in_rows[:, None] & in_columns[None, :]
    left = tl.load(reduced + rows[:, None] * rank + ranks[None, :], in_rows[:, None] & (ranks < rank)[None, :], 0.0)
    right = tl.load(b + columns[None, :] * rank + ranks[:, None], in_columns[None, :] & (ranks < rank)[:, None], 0.0)
    tile = tl.load(out + rows[:, None].to(tl.int64) * width + columns[None, :], mask, 0.0).to(tl.float32)
    return tile + tl.dot(left, right, out_dtype=tl.float32), mask


@triton.jit
def _forward(
    gate, up, reduced_gate, reduced_up, b_gate, b_up, out, height, width, rank,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < height, columns < width
    g, mask = _whole(gate, reduced_gate, b_gate, rows, columns, in_rows, in_columns, width, rank, RANK)
    u, mask = _whole(up, reduced_up, b_up, rows, columns, in_rows, in_columns, width, rank, RANK)
    product = g * tl.sigmoid(g) * u
    tl.store(out + rows[:, None].to(tl.int64) * width + columns[None, :], product.to(out.dtype.element_ty), mask)


@triton.jit
def _backward(
    d_out, gate, up, reduced_gate, reduced_up, b_gate, b_up, d_gate, d_up, height, width, rank,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < height, columns < width
    g, mask = _whole(gate, reduced_gate, b_gate, rows, columns, in_rows, in_columns, width, rank, RANK)
    u, mask = _whole(up, reduced_up, b_up, rows, columns, in_rows, in_columns, width, rank, RANK)
    at = rows[:, None].to(tl.int64) * width + columns[None, :]
    d = tl.load(d_out + at, mask, 0.0).to(tl.float32)
    share = tl.sigmoid(g)
    tl.store(d_gate + at, (d * u * share * (1 + g * (1 - share))).to(d_gate.dtype.element_ty), mask)
    tl.store(d_up + at, (d * g * share).to(d_up.dtype.element_ty), mask)


def _launch(kernel: Any, tensors: list[Tensor], like: Tensor, rank: int) -> None:
    height, width = like.shape
    grid = (triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS))
    padded = max(16, triton.next_power_of_2(rank))
    kernel[grid](*tensors, height, width, rank, RANK=padded, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8)


def forward(gate: Tensor, up: Tensor, reduced: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """[rows, width] The product, for gate and up [rows, width], reduced [rows, rank] and b [width, rank]."""
    out = torch.empty_like(gate)
    _launch(_forward, [gate, up, *reduced, *b, out], gate, b[0].shape[1])
    return out


def backward(
    d_out: Tensor, gate: Tensor, up: Tensor, reduced: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients by the whole gate and the whole up."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _launch(_backward, [d_out, gate, up, *reduced, *b, d_gate, d_up], gate, b[0].shape[1])
    return d_gate, d_up
