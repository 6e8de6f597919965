"""Triton kernels of causal attention within the documents of a packed row (FlashAttention, arXiv:2307.08691).

What differs from kernels for a batch of sequences, and why it is faster on packed chats:

- Blocks are cut from the row, not from each document, and every token knows the first and the last that it shares a
  score with. There is no block of an empty or a short document that only finds out that it has nothing to do.
- The query heads that share a head of keys lie in one block, so a block of 64 rows holds 16 tokens where there are
  four: less of it is cut off by a document's edge or by the diagonal, and keys are read once for all of them.
- The backward pass adds nothing up through memory: queries in one kernel, keys and values in another. It is a
  seventh product more, and the same bits every time.

`packing.varlen` makes an operation of torch's library of them. All times measured on an H200.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward", "limits"]

ROWS, KEYS, WARPS = 64, 64, 4
"""Of a block: queries times heads, keys, and warps."""
ROWS_FOR_KEYS = {64: 64, 128: 32}
"""By head size, rows at a time in the kernel that walks through them for a block of keys: it holds two sums."""
STAGES_FOR_ROWS = {64: 3, 128: 2}
"""By head size, blocks of keys on their way at once in the backward kernel that holds a block of rows."""
LOG2_E = 1.4426950408889634


@triton.jit
def _limits(boundaries, lows, highs, size, documents, steps, window, WINDOW: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < size
    left = tl.zeros((TOKENS,), tl.int32)
    right = tl.zeros((TOKENS,), tl.int32) + documents - 1
    for _ in range(steps):  # bisection for the first document that ends behind the token
        middle = (left + right) // 2
        behind = tl.load(boundaries + middle + 1) > token
        left, right = tl.where(behind, left, tl.minimum(middle + 1, right)), tl.where(behind, middle, right)
    low, high = tl.load(boundaries + left), tl.load(boundaries + left + 1)
    if WINDOW:
        low, high = tl.maximum(low, token - window + 1), tl.minimum(high, token + window)
    tl.store(lows + token, low, there)
    tl.store(highs + token, high, there)


@triton.jit
def _rows(first, size, kv_head, GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Of each row of the block that begins with token `first`: its token, counted from there, its query head, and
    whether there is such."""
    rows = tl.arange(0, ROWS)
    step, member = rows // PADDED, rows % PADDED
    return step, kv_head * GROUP + member, (first + step < size) & (member < GROUP)


@triton.jit
def _places(base, first, rows, stride, columns):
    """[rows, columns] Of numbers in memory: only the first row's place may need 64 bits."""
    return base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])


@triton.jit
def _tile(base, first, rows, stride, columns, there, MASKED: tl.constexpr):
    """[rows, columns] of a matrix, zeros where none is there."""
    where = _places(base, first, rows, stride, columns)
    return tl.load(where, there[:, None], 0.0) if MASKED else tl.load(where)


@triton.jit
def _inner(begin, full, first, STEP: tl.constexpr):
    """Of steps from `begin` on, where those begin and end that need no mask: all rows of a block see [full, first]."""
    inner = begin + (full - begin + STEP - 1) // STEP * STEP
    return inner, inner + tl.maximum(first + 1 - inner, 0) // STEP * STEP


@triton.jit
def _attend(
    total, most, sums, query, keys, values, key_stride, value_stride, at, size, token, low, scale,
    MASKED: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of keys: the weighted sum of values, the largest score and the sum of weights so far."""
    columns, rows = tl.arange(0, SIZE), tl.arange(0, KEYS)
    place = at + rows
    key = _tile(keys, at, rows, key_stride, columns, place < size, MASKED)
    scores = tl.dot(query, tl.trans(key)) * scale
    if MASKED:
        seen = (place[None, :] <= token[:, None]) & (place[None, :] >= low[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    largest = tl.maximum(most, tl.max(scores, 1))
    base = tl.where(largest == float("-inf"), 0.0, largest) if MASKED else largest  # a row that saw nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(most - base)
    value = _tile(values, at, rows, value_stride, columns, place < size, MASKED)
    total = tl.dot(weights.to(value.dtype), value, total * shrink[:, None])
    return total, largest, sums * shrink + tl.sum(weights, 1)


@triton.jit
def _forward(
    query, keys, values, sinks, out, logs, lows, size, query_stride, query_head, key_stride, key_head, value_stride,
    value_head, heads, scale, GROUP: tl.constexpr, PADDED: tl.constexpr, SINKS: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    kv_head, first = tl.program_id(0), tl.program_id(1) * (ROWS // PADDED)
    step, head, there = _rows(first, size, kv_head, GROUP, PADDED, ROWS)
    token, columns = first + step, tl.arange(0, SIZE)
    q = _tile(query + head[:, None] * query_head, first, step, query_stride, columns, there, True)
    low = tl.load(lows + token, there, 0)
    last = tl.minimum(first + ROWS // PADDED, size) - 1
    begin, full = tl.load(lows + first), tl.load(lows + last)
    inner, after = _inner(begin, full, first, KEYS)
    keys, values = keys + kv_head * key_head, values + kv_head * value_head
    total = tl.zeros((ROWS, SIZE), tl.float32)
    if SINKS:
        most = tl.load(sinks + head, there, 0.0).to(tl.float32) * 1.4426950408889634
        sums = tl.full((ROWS,), 1.0, tl.float32)
    else:
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        sums = tl.zeros((ROWS,), tl.float32)
    # Three loops one after another take 0.9 of the time of two, of which one does both edges; not so on the way back.
    for at in tl.range(begin, tl.minimum(inner, last + 1), KEYS, num_stages=STAGES):
        total, most, sums = _attend(
            total, most, sums, q, keys, values, key_stride, value_stride, at, size, token, low, scale, True, SIZE, KEYS
        )
    for at in tl.range(inner, after, KEYS, num_stages=STAGES):
        total, most, sums = _attend(
            total, most, sums, q, keys, values, key_stride, value_stride, at, size, token, low, scale, False, SIZE, KEYS
        )
    for at in tl.range(after, last + 1, KEYS, num_stages=STAGES):
        total, most, sums = _attend(
            total, most, sums, q, keys, values, key_stride, value_stride, at, size, token, low, scale, True, SIZE, KEYS
        )
    result = (total / sums[:, None]).to(q.dtype)
    tl.store(_places(out + head[:, None] * SIZE, first, step, heads * SIZE, columns), result, there[:, None])
    tl.store(logs + token * heads + head, most + tl.log2(sums), there)


@triton.jit
def _query_step(
    total, query, d_out, logs, shift, keys, values, key_stride, value_stride, at, size, token, low, scale,
    MASKED: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    columns, rows = tl.arange(0, SIZE), tl.arange(0, KEYS)
    place = at + rows
    key = _tile(keys, at, rows, key_stride, columns, place < size, MASKED)
    value = _tile(values, at, rows, value_stride, columns, place < size, MASKED)
    weights = tl.exp2(tl.dot(query, tl.trans(key)) * scale - logs[:, None])
    if MASKED:
        seen = (place[None, :] <= token[:, None]) & (place[None, :] >= low[:, None])
        weights = tl.where(seen, weights, 0.0)
    d_scores = weights * (tl.dot(d_out, tl.trans(value)) - shift[:, None])
    return tl.dot(d_scores.to(key.dtype), key, total)


@triton.jit
def _by_query(
    query, keys, values, out, d_out, logs, shifts, d_query, lows, size, query_stride, query_head, key_stride, key_head,
    value_stride, value_head, heads, scale, scaling, GROUP: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    kv_head, first = tl.program_id(0), tl.program_id(1) * (ROWS // PADDED)
    step, head, there = _rows(first, size, kv_head, GROUP, PADDED, ROWS)
    token, columns = first + step, tl.arange(0, SIZE)
    q = _tile(query + head[:, None] * query_head, first, step, query_stride, columns, there, True)
    d = _tile(d_out + head[:, None] * SIZE, first, step, heads * SIZE, columns, there, True)
    o = _tile(out + head[:, None] * SIZE, first, step, heads * SIZE, columns, there, True)
    shift = tl.sum(o.to(tl.float32) * d.to(tl.float32), 1)
    tl.store(shifts + token * heads + head, shift, there)
    log = tl.load(logs + token * heads + head, there, 0.0)
    low = tl.load(lows + token, there, 0)
    last = tl.minimum(first + ROWS // PADDED, size) - 1
    begin, full = tl.load(lows + first), tl.load(lows + last)
    inner, after = _inner(begin, full, first, KEYS)
    keys, values = keys + kv_head * key_head, values + kv_head * value_head
    total = tl.zeros((ROWS, SIZE), tl.float32)
    for at in tl.range(inner, after, KEYS, num_stages=STAGES):
        total = _query_step(
            total, q, d, log, shift, keys, values, key_stride, value_stride, at, size, token, low, scale, False,
            SIZE, KEYS,
        )  # fmt: skip
    before = (tl.minimum(inner, last + 1) - begin + KEYS - 1) // KEYS
    edges = before + tl.maximum(last - after + KEYS, 0) // KEYS
    for edge in tl.range(0, edges, num_stages=STAGES):
        at = tl.where(edge < before, begin + edge * KEYS, after + (edge - before) * KEYS)
        total = _query_step(
            total, q, d, log, shift, keys, values, key_stride, value_stride, at, size, token, low, scale, True,
            SIZE, KEYS,
        )  # fmt: skip
    result = (total * scaling).to(q.dtype)
    tl.store(_places(d_query + head[:, None] * SIZE, first, step, heads * SIZE, columns), result, there[:, None])


@triton.jit
def _key_step(
    by_key, by_value, key, value, query, query_stride, query_head, d_out, logs, shifts, at, size, kv_head, heads, place,
    high, scale, MASKED: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    step, head, there = _rows(at, size, kv_head, GROUP, PADDED, ROWS)
    token, columns = at + step, tl.arange(0, SIZE)
    where = token * heads + head
    some: tl.constexpr = MASKED or GROUP != PADDED
    q = _tile(query + head[:, None] * query_head, at, step, query_stride, columns, there, some)
    d = _tile(d_out + head[:, None] * SIZE, at, step, heads * SIZE, columns, there, some)
    log = tl.load(logs + where, there, 0.0) if some else tl.load(logs + where)
    shift = tl.load(shifts + where, there, 0.0) if some else tl.load(shifts + where)
    weights = tl.exp2(tl.dot(key, tl.trans(q)) * scale - log[None, :])
    if MASKED:
        seen = (token[None, :] >= place[:, None]) & (token[None, :] < high[:, None])
        weights = tl.where(seen, weights, 0.0)
    by_value = tl.dot(weights.to(d.dtype), d, by_value)
    d_scores = weights * (tl.dot(value, tl.trans(d)) - shift[None, :])
    return tl.dot(d_scores.to(q.dtype), q, by_key), by_value


@triton.jit
def _by_key(
    query, keys, values, d_out, logs, shifts, d_keys, d_values, highs, size, query_stride, query_head, key_stride,
    key_head, value_stride, value_head, heads, scale, scaling, GROUP: tl.constexpr, PADDED: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    STEP: tl.constexpr = ROWS // PADDED
    kv_head, first = tl.program_id(0), tl.program_id(1) * KEYS
    columns, rows = tl.arange(0, SIZE), tl.arange(0, KEYS)
    place = first + rows
    there = place < size
    key = _tile(keys + kv_head * key_head, first, rows, key_stride, columns, there, True)
    value = _tile(values + kv_head * value_head, first, rows, value_stride, columns, there, True)
    high = tl.load(highs + place, there, 0)
    stop, full = tl.load(highs + tl.minimum(first + KEYS, size) - 1), tl.load(highs + first)
    inner = first + KEYS  # before it, the diagonal
    after = inner + tl.maximum(full - inner, 0) // STEP * STEP
    by_key = tl.zeros((KEYS, SIZE), tl.float32)
    by_value = tl.zeros((KEYS, SIZE), tl.float32)
    for at in tl.range(inner, after, STEP, num_stages=STAGES):
        by_key, by_value = _key_step(
            by_key, by_value, key, value, query, query_stride, query_head, d_out, logs, shifts, at, size, kv_head,
            heads, place, high, scale, False, GROUP, PADDED, SIZE, ROWS,
        )  # fmt: skip
    before = tl.minimum(KEYS, stop - first + STEP - 1) // STEP
    edges = before + tl.maximum(stop - after + STEP - 1, 0) // STEP
    for edge in tl.range(0, edges, num_stages=STAGES):
        at = tl.where(edge < before, first + edge * STEP, after + (edge - before) * STEP)
        by_key, by_value = _key_step(
            by_key, by_value, key, value, query, query_stride, query_head, d_out, logs, shifts, at, size, kv_head,
            heads, place, high, scale, True, GROUP, PADDED, SIZE, ROWS,
        )  # fmt: skip
    stride = heads // GROUP * SIZE
    by_key = (by_key * scaling).to(key.dtype)
    tl.store(_places(d_keys + kv_head * SIZE, first, rows, stride, columns), by_key, there[:, None])
    tl.store(_places(d_values + kv_head * SIZE, first, rows, stride, columns), by_value.to(key.dtype), there[:, None])


def limits(boundaries: Tensor, size: int, window: int | None) -> tuple[Tensor, Tensor]:
    """int32 [T] each: the first token that a token sees, and the token after the last that sees it."""
    lows, highs = (boundaries.new_empty(size) for _ in range(2))
    documents, tokens = len(boundaries) - 1, 512
    kernel: Any = _limits
    kernel[(triton.cdiv(size, tokens),)](
        boundaries, lows, highs, size, documents, documents.bit_length(), window or 0, WINDOW=window is not None,
        TOKENS=tokens,
    )  # fmt: skip
    return lows, highs


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for each in tensors for stride in each.stride()[:2]]


def _group(query: Tensor, keys: Tensor) -> tuple[int, int]:
    """Query heads to a head of keys, and the power of two that a block has room for."""
    group = query.shape[1] // keys.shape[1]
    padded: int = triton.next_power_of_2(group)
    return group, padded


def forward(
    query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, lows: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The output [T, heads, size], and the logarithms (to base 2) of the sums of each row's weights [T, heads] in
    float32, for `query` [T, heads, size], `keys` and `values` [T, key heads, size], whose last dimension is contiguous.

    `lows` int32 [T] is the first token that each sees, and never falls. `sinks` [heads] are scores that take their
    share of the softmax and give nothing.
    """
    (size, heads, width), (group, padded) = query.shape, _group(query, keys)
    out = query.new_empty(size, heads, width)
    logs = query.new_empty(size, heads, dtype=torch.float32)
    kernel: Any = _forward
    kernel[(keys.shape[1], triton.cdiv(size, ROWS // padded))](
        query, keys, values, sinks, out, logs, lows, size, *_strides(query, keys, values), heads, scaling * LOG2_E,
        GROUP=group, PADDED=padded, SINKS=sinks is not None, SIZE=width, ROWS=ROWS, KEYS=KEYS, STAGES=3,
        num_warps=WARPS,
    )  # fmt: skip
    return out, logs


def backward(
    d_out: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, logs: Tensor, lows: Tensor, highs: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by query, keys and values, and the sums of d_out * out [T, heads], for contiguous `d_out` and what
    `forward` was given and gave. `highs` int32 [T] is the token after the last that sees each, and never falls."""
    (size, heads, width), (group, padded) = query.shape, _group(query, keys)
    d_query, d_keys, d_values = (each.new_empty(each.shape) for each in (query, keys, values))
    shifts = torch.empty_like(logs)
    where = (size, *_strides(query, keys, values), heads, scaling * LOG2_E, scaling)
    shape = {"GROUP": group, "PADDED": padded, "SIZE": width, "KEYS": KEYS, "num_warps": WARPS}
    by_query: Any = _by_query
    by_query[(keys.shape[1], triton.cdiv(size, ROWS // padded))](
        query, keys, values, out, d_out, logs, shifts, d_query, lows, *where, **shape, ROWS=ROWS,
        STAGES=STAGES_FOR_ROWS[width],
    )  # fmt: skip
    by_key: Any = _by_key
    by_key[(keys.shape[1], triton.cdiv(size, KEYS))](
        query, keys, values, d_out, logs, shifts, d_keys, d_values, highs, *where, **shape,
        ROWS=ROWS_FOR_KEYS[width], STAGES=3,
    )  # fmt: skip
    return d_query, d_keys, d_values, shifts
