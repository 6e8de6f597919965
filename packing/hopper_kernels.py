"""Triton kernels of causal attention within the documents of a packed row (FlashAttention, arXiv:2307.08691).

What differs from kernels for a batch of sequences, and why it is faster on packed chats:

- Blocks are cut from the row, not from each document, and every token knows the first and the last that it shares a
  score with. There is no block of an empty or a short document that only finds out that it has nothing to do.
- The query heads that share a head of keys lie in one block, so a block of 64 rows holds 16 tokens where there are
  four: less of it is cut off by a document's edge or by the diagonal, and keys are read once for all of them.
- The backward pass adds nothing up through memory: queries in one kernel, keys and values in another. That is seven
  products instead of five, and the same bits every time.

Names beside the paper's: `total` is O before it is divided, `most` is m, `sums` l, `logs` the logsumexp (to base 2),
`shifts` D = rowsum(dO * O). A number that is not finite may reach other documents that share a block with it.

`packing.hopper` makes an operation of torch's library of them. All times measured on an H200.
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
STAGES = 3
"""Blocks on their way from memory at once."""
STAGES_FOR_QUERY = {64: 3, 128: 2}
"""By head size, likewise in the backward kernel that holds a block of rows."""
LIMITS = 512
"""Tokens whose limits one program finds."""
LOG2_E = 1.4426950408889634
VARYING = ["tokens", "documents", "steps"]
"""Numbers that differ from batch to batch: Triton would compile a kernel again for those that 16 divides."""


@triton.jit(do_not_specialize=VARYING)
def _limits(boundaries, lows, highs, tokens, documents, steps, window, WINDOW: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    # Bisection for the first document that ends behind the token; what is behind the last boundary belongs to the last.
    left = tl.zeros((TOKENS,), tl.int32)
    right = tl.zeros((TOKENS,), tl.int32) + documents - 1
    for _ in range(steps):
        middle = (left + right) // 2
        behind = tl.load(boundaries + middle + 1) > token
        left, right = tl.where(behind, left, tl.minimum(middle + 1, right)), tl.where(behind, middle, right)
    low = tl.load(boundaries + left)
    high = tl.where(left == documents - 1, tokens, tl.load(boundaries + left + 1))
    if WINDOW:
        low, high = tl.maximum(low, token - window + 1), tl.minimum(high, token + window)
    tl.store(lows + token, low, there)
    tl.store(highs + token, high, there)


@triton.jit
def _place(heads, GROUP: tl.constexpr):
    """The head of keys that a program is for, and its block."""
    kv_heads = heads // GROUP
    return tl.program_id(0) % kv_heads, tl.program_id(0) // kv_heads


@triton.jit
def _rows(first, tokens, GROUP: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Of each row of the block that begins with token `first`: its token, counted from there, its query head, counted
    from the first of the group, and whether there is such."""
    rows = tl.arange(0, ROWS)
    step, member = rows // PADDED, rows % PADDED
    return step, member, (first + step < tokens) & (member < GROUP)


@triton.jit
def _head(base, number, stride):
    """Where a head begins, which with heads before tokens may be more than 32 bits away."""
    return base + tl.cast(number, tl.int64) * stride


@triton.jit
def _places(base, first, rows, stride, columns):
    """[rows, columns] Where the numbers of a block lie: only the way to its first row may need 64 bits."""
    return base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])


@triton.jit
def _tile(base, first, rows, stride, columns, there, MASKED: tl.constexpr):
    """[rows, columns] of a matrix, zeros where none is there."""
    where = _places(base, first, rows, stride, columns)
    return tl.load(where, there[:, None], 0.0) if MASKED else tl.load(where)


@triton.jit
def _seen(lows, first, token, there, tokens, STEP: tl.constexpr, KEYS: tl.constexpr):
    """What a block of STEP tokens sees: from where on each row, the last token of the block, from where on any row, and
    where those blocks of keys begin and end that need no mask, for all rows see them whole."""
    low = tl.load(lows + token, there, 0)
    last = tl.minimum(first + STEP, tokens) - 1
    begin, full = tl.load(lows + first), tl.load(lows + last)
    inner = begin + (full - begin + KEYS - 1) // KEYS * KEYS
    return low, last, begin, inner, inner + tl.maximum(first + 1 - inner, 0) // KEYS * KEYS


@triton.jit
def _attend(
    total, most, sums, query, keys, values, key_stride, value_stride, at, tokens, token, low, scale,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of keys: the weighted sum of values, the largest score and the sum of weights so far."""
    columns, rows = tl.arange(0, WIDTH), tl.arange(0, KEYS)
    place = at + rows
    key = _tile(keys, at, rows, key_stride, columns, place < tokens, MASKED)
    scores = tl.dot(query, tl.trans(key)) * scale
    if MASKED:
        seen = (place[None, :] <= token[:, None]) & (place[None, :] >= low[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    largest = tl.maximum(most, tl.max(scores, 1))
    base = tl.where(largest == float("-inf"), 0.0, largest) if MASKED else largest  # a row that saw nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(most - base)
    value = _tile(values, at, rows, value_stride, columns, place < tokens, MASKED)
    total = tl.dot(weights.to(value.dtype), value, total * shrink[:, None])
    return total, largest, sums * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=VARYING)
def _forward(
    query, keys, values, sinks, out, logs, lows, tokens, query_stride, query_head, key_stride, key_head, value_stride,
    value_head, heads, scale, GROUP: tl.constexpr, PADDED: tl.constexpr, SINKS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows, through the keys that any of them sees: masked, whole, masked."""
    kv_head, block = _place(heads, GROUP)
    first = block * (ROWS // PADDED)
    step, member, there = _rows(first, tokens, GROUP, PADDED, ROWS)
    token, head, columns = first + step, kv_head * GROUP + member, tl.arange(0, WIDTH)
    group = _head(query, kv_head * GROUP, query_head)
    q = _tile(group + member[:, None] * query_head, first, step, query_stride, columns, there, True)
    low, last, begin, inner, after = _seen(lows, first, token, there, tokens, ROWS // PADDED, KEYS)
    keys, values = _head(keys, kv_head, key_head), _head(values, kv_head, value_head)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    if SINKS:
        most = tl.load(sinks + head, there, 0.0).to(tl.float32) * 1.4426950408889634  # LOG2_E
        sums = tl.full((ROWS,), 1.0, tl.float32)
    else:
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        sums = tl.zeros((ROWS,), tl.float32)
    for at in tl.range(begin, tl.minimum(inner, last + 1), KEYS, num_stages=STAGES):
        total, most, sums = _attend(
            total, most, sums, q, keys, values, key_stride, value_stride, at, tokens, token, low, scale, True,
            WIDTH, KEYS,
        )  # fmt: skip
    for at in tl.range(inner, after, KEYS, num_stages=STAGES):
        total, most, sums = _attend(
            total, most, sums, q, keys, values, key_stride, value_stride, at, tokens, token, low, scale, False,
            WIDTH, KEYS,
        )  # fmt: skip
    for at in tl.range(after, last + 1, KEYS, num_stages=STAGES):
        total, most, sums = _attend(
            total, most, sums, q, keys, values, key_stride, value_stride, at, tokens, token, low, scale, True,
            WIDTH, KEYS,
        )  # fmt: skip
    result = (total / sums[:, None]).to(q.dtype)
    tl.store(_places(out + head[:, None] * WIDTH, first, step, heads * WIDTH, columns), result, there[:, None])
    tl.store(logs + token * heads + head, most + tl.log2(sums), there)


@triton.jit
def _query_step(
    total, query, d_out, logs, shift, keys, values, key_stride, value_stride, at, tokens, token, low, scale,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of keys: what it adds to the rows' gradient."""
    columns, rows = tl.arange(0, WIDTH), tl.arange(0, KEYS)
    place = at + rows
    key = _tile(keys, at, rows, key_stride, columns, place < tokens, MASKED)
    value = _tile(values, at, rows, value_stride, columns, place < tokens, MASKED)
    weights = tl.exp2(tl.dot(query, tl.trans(key)) * scale - logs[:, None])
    if MASKED:
        seen = (place[None, :] <= token[:, None]) & (place[None, :] >= low[:, None])
        weights = tl.where(seen, weights, 0.0)
    d_scores = weights * (tl.dot(d_out, tl.trans(value)) - shift[:, None])
    return tl.dot(d_scores.to(key.dtype), key, total)


@triton.jit(do_not_specialize=VARYING)
def _by_query(
    query, keys, values, out, d_out, logs, shifts, d_query, lows, tokens, query_stride, query_head, key_stride,
    key_head, value_stride, value_head, heads, scale, scaling, GROUP: tl.constexpr, PADDED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of rows, through the keys that any of them sees: whole blocks, then both edges."""
    kv_head, block = _place(heads, GROUP)
    first = block * (ROWS // PADDED)
    step, member, there = _rows(first, tokens, GROUP, PADDED, ROWS)
    token, head, columns = first + step, kv_head * GROUP + member, tl.arange(0, WIDTH)
    group = _head(query, kv_head * GROUP, query_head)
    q = _tile(group + member[:, None] * query_head, first, step, query_stride, columns, there, True)
    d = _tile(d_out + head[:, None] * WIDTH, first, step, heads * WIDTH, columns, there, True)
    o = _tile(out + head[:, None] * WIDTH, first, step, heads * WIDTH, columns, there, True)
    shift = tl.sum(o.to(tl.float32) * d.to(tl.float32), 1)
    tl.store(shifts + token * heads + head, shift, there)
    log = tl.load(logs + token * heads + head, there, 0.0)
    low, last, begin, inner, after = _seen(lows, first, token, there, tokens, ROWS // PADDED, KEYS)
    keys, values = _head(keys, kv_head, key_head), _head(values, kv_head, value_head)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for at in tl.range(inner, after, KEYS, num_stages=STAGES):
        total = _query_step(
            total, q, d, log, shift, keys, values, key_stride, value_stride, at, tokens, token, low, scale, False,
            WIDTH, KEYS,
        )  # fmt: skip
    before = (tl.minimum(inner, last + 1) - begin + KEYS - 1) // KEYS
    edges = before + tl.maximum(last - after + KEYS, 0) // KEYS
    for edge in tl.range(0, edges, num_stages=STAGES):
        at = tl.where(edge < before, begin + edge * KEYS, after + (edge - before) * KEYS)
        total = _query_step(
            total, q, d, log, shift, keys, values, key_stride, value_stride, at, tokens, token, low, scale, True,
            WIDTH, KEYS,
        )  # fmt: skip
    result = (total * scaling).to(q.dtype)
    tl.store(_places(d_query + head[:, None] * WIDTH, first, step, heads * WIDTH, columns), result, there[:, None])


@triton.jit
def _key_step(
    by_key, by_value, key, value, group, query_stride, query_head, d_out, logs, shifts, at, tokens, kv_head, heads,
    place, high, scale, MASKED: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One block of rows: what it adds to the keys' and values' gradients."""
    step, member, there = _rows(at, tokens, GROUP, PADDED, ROWS)
    token, head, columns = at + step, kv_head * GROUP + member, tl.arange(0, WIDTH)
    row = token * heads + head
    some: tl.constexpr = MASKED or GROUP != PADDED
    q = _tile(group + member[:, None] * query_head, at, step, query_stride, columns, there, some)
    d = _tile(d_out + head[:, None] * WIDTH, at, step, heads * WIDTH, columns, there, some)
    log = tl.load(logs + row, there, 0.0) if some else tl.load(logs + row)
    shift = tl.load(shifts + row, there, 0.0) if some else tl.load(shifts + row)
    weights = tl.exp2(tl.dot(key, tl.trans(q)) * scale - log[None, :])
    if MASKED:
        seen = (token[None, :] >= place[:, None]) & (token[None, :] < high[:, None])
        weights = tl.where(seen, weights, 0.0)
    by_value = tl.dot(weights.to(d.dtype), d, by_value)
    d_scores = weights * (tl.dot(value, tl.trans(d)) - shift[None, :])
    return tl.dot(d_scores.to(q.dtype), q, by_key), by_value


@triton.jit(do_not_specialize=VARYING)
def _by_key(
    query, keys, values, d_out, logs, shifts, d_keys, d_values, highs, tokens, query_stride, query_head, key_stride,
    key_head, value_stride, value_head, heads, scale, scaling, GROUP: tl.constexpr, PADDED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, through the rows that see any of them: whole blocks, then both
    edges."""
    STEP: tl.constexpr = ROWS // PADDED
    kv_head, block = _place(heads, GROUP)
    first, group = block * KEYS, _head(query, kv_head * GROUP, query_head)
    columns, rows = tl.arange(0, WIDTH), tl.arange(0, KEYS)
    place = first + rows
    there = place < tokens
    key = _tile(_head(keys, kv_head, key_head), first, rows, key_stride, columns, there, True)
    value = _tile(_head(values, kv_head, value_head), first, rows, value_stride, columns, there, True)
    high = tl.load(highs + place, there, 0)
    stop, full = tl.load(highs + tl.minimum(first + KEYS, tokens) - 1), tl.load(highs + first)
    inner = first + KEYS  # before it, the diagonal
    after = inner + tl.maximum(full - inner, 0) // STEP * STEP
    by_key = tl.zeros((KEYS, WIDTH), tl.float32)
    by_value = tl.zeros((KEYS, WIDTH), tl.float32)
    for at in tl.range(inner, after, STEP, num_stages=STAGES):
        by_key, by_value = _key_step(
            by_key, by_value, key, value, group, query_stride, query_head, d_out, logs, shifts, at, tokens, kv_head,
            heads, place, high, scale, False, GROUP, PADDED, WIDTH, ROWS,
        )  # fmt: skip
    before = tl.minimum(KEYS, stop - first + STEP - 1) // STEP
    edges = before + tl.maximum(stop - after + STEP - 1, 0) // STEP
    for edge in tl.range(0, edges, num_stages=STAGES):
        at = tl.where(edge < before, first + edge * STEP, after + (edge - before) * STEP)
        by_key, by_value = _key_step(
            by_key, by_value, key, value, group, query_stride, query_head, d_out, logs, shifts, at, tokens, kv_head,
            heads, place, high, scale, True, GROUP, PADDED, WIDTH, ROWS,
        )  # fmt: skip
    stride = heads // GROUP * WIDTH
    by_key = (by_key * scaling).to(key.dtype)
    tl.store(_places(d_keys + kv_head * WIDTH, first, rows, stride, columns), by_key, there[:, None])
    tl.store(_places(d_values + kv_head * WIDTH, first, rows, stride, columns), by_value.to(key.dtype), there[:, None])


def limits(boundaries: Tensor, tokens: int, window: int | None) -> tuple[Tensor, Tensor]:
    """int32 [T] each: the first token that a token sees, and the token after the last that sees it."""
    lows, highs = (boundaries.new_empty(tokens, dtype=torch.int32) for _ in range(2))
    documents = len(boundaries) - 1
    kernel: Any = _limits
    kernel[(triton.cdiv(tokens, LIMITS),)](
        boundaries, lows, highs, tokens, documents, documents.bit_length(), min(window or 0, tokens),
        WINDOW=window is not None, TOKENS=LIMITS,
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
    (tokens, heads, width), (group, padded) = query.shape, _group(query, keys)
    out = query.new_empty(tokens, heads, width)
    logs = query.new_empty(tokens, heads, dtype=torch.float32)
    kernel: Any = _forward
    kernel[(keys.shape[1] * triton.cdiv(tokens, ROWS // padded),)](
        query, keys, values, sinks, out, logs, lows, tokens, *_strides(query, keys, values), heads, scaling * LOG2_E,
        GROUP=group, PADDED=padded, SINKS=sinks is not None, WIDTH=width, ROWS=ROWS, KEYS=KEYS, STAGES=STAGES,
        num_warps=WARPS,
    )  # fmt: skip
    return out, logs


def backward(
    d_out: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, logs: Tensor, lows: Tensor, highs: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by query, keys and values, and the sums of d_out * out [T, heads], for contiguous `d_out` and what
    `forward` was given and gave. `highs` int32 [T] is the token after the last that sees each, and never falls."""
    (tokens, heads, width), (group, padded) = query.shape, _group(query, keys)
    d_query, d_keys, d_values = (each.new_empty(each.shape) for each in (query, keys, values))
    shifts = torch.empty_like(logs)
    sizes = (tokens, *_strides(query, keys, values), heads, scaling * LOG2_E, scaling)
    shape = {"GROUP": group, "PADDED": padded, "WIDTH": width, "KEYS": KEYS, "num_warps": WARPS}
    by_query: Any = _by_query
    by_query[(keys.shape[1] * triton.cdiv(tokens, ROWS // padded),)](
        query, keys, values, out, d_out, logs, shifts, d_query, lows, *sizes, **shape, ROWS=ROWS,
        STAGES=STAGES_FOR_QUERY[width],
    )  # fmt: skip
    by_key: Any = _by_key
    by_key[(keys.shape[1] * triton.cdiv(tokens, KEYS),)](
        query, keys, values, d_out, logs, shifts, d_keys, d_values, highs, *sizes, **shape,
        ROWS=ROWS_FOR_KEYS[width], STAGES=STAGES,
    )  # fmt: skip
    return d_query, d_keys, d_values, shifts
