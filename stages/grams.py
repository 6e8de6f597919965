"""Hashes of runs of tokens (n-grams), by which pack tells which rows say nearly the same.

Runs lie within one content of one turn, so what the chat template writes never counts. They are hashed from the flat
token ids of a record batch at a time: a few NumPy operations a token, and no text is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.marks import ORIGIN_CONTENT, ROLES, TRAIN_NO
from stages.tables import Numbers, origins, read_batches, roles, trains
from stages.tokenized import Files, Flags, Rows, Shard, Spans, by_shard, consecutive, read_spans

Hashes = NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Grams:
    """The runs of some rows, flat."""

    rows: Numbers
    """[rows] Numbers of the rows, rising."""
    counts: Numbers
    """[rows] Runs in each."""
    hashes: Hashes
    """[runs]"""
    holders: Hashes
    """[runs] What holds it: one number for the same question wherever it is asked, which what answers it shares; a
    system prompt has its row's own."""
    questions: Hashes
    """Those of all that is asked."""


def read_grams(
    files: Files, shards: Sequence[Shard], rows: Rows, wanted: Flags, size: int, *, only_asked: bool = False
) -> Iterator[Grams]:
    """The runs of `size` tokens in what the `wanted` rows [rows] say, or `only_asked` in what they ask, a record batch
    at a time."""
    own = by_shard(rows.shard, len(shards))
    width = rows.sequences
    holding = [number for number, those in enumerate(own) if wanted[those].any()]
    for number, shard in zip(holding, files.in_turn([shards[n] for n in holding]), strict=True):
        position = own[number].start * width
        spans = read_batches(files.spans / shard.path / "spans.arrow")
        ids = read_batches(files.tokens / shard.path / "tokens.arrow")
        for one, other in zip(spans, ids, strict=True):
            row = (position + np.arange(len(one))) // width
            position += len(one)
            if wanted[row].any():
                yield _of_batch(read_spans(one), other.column("ids"), row, wanted[row], size, only_asked)


def _of_batch(spans: Spans, ids: pa.ListArray, row: Numbers, wanted: Flags, size: int, only_asked: bool) -> Grams:
    """`row` and `wanted` are of each sequence in a record batch."""
    sequence = spans.sequence
    own = np.unique(row[wanted])
    place = np.searchsorted(own, row[sequence])
    content = wanted[sequence] & (origins(spans.kinds) == ORIGIN_CONTENT)
    asks = _asks(spans, content, place)
    chosen = (asks if only_asked else content) & (spans.ends - spans.starts >= size)
    lengths = spans.lengths
    begins = (np.cumsum(lengths) - lengths)[sequence] + spans.starts
    counts = (spans.ends - spans.starts)[chosen] - size + 1
    numbers = ids.flatten().to_numpy()
    hashes = hash_runs(numbers, size)[consecutive(begins[chosen], counts)]
    per_row = np.bincount(place[chosen], weights=counts, minlength=len(own))
    # A sum of the tokens' random numbers: order aside, two texts have the same one when they are the same.
    sums = np.append(np.uint64(0), np.cumsum(hash_runs(numbers, 1), dtype=np.uint64))
    said = sums[begins + spans.ends - spans.starts] - sums[begins]
    last = np.maximum.accumulate(np.where(asks, np.arange(len(asks)), -1))
    answers = (last >= 0) & (sequence[last] == sequence) & (roles(spans.kinds) != ROLES.index("system"))
    holders = np.where(answers, said[last], row[sequence].astype(np.uint64))
    return Grams(own, per_row.astype(np.int64), hashes, np.repeat(holders[chosen], counts), said[asks])


def _asks(spans: Spans, content: Flags, place: Numbers) -> Flags:
    """[spans] Which of the `content` [spans] ask: what users and tools say, and raw text that is said not to train; all
    raw text of a row, by its `place` [spans], without any of these."""
    role = roles(spans.kinds)
    text = content & (role == ROLES.index("text"))
    asks = content & ((role == ROLES.index("user")) | (role == ROLES.index("tool")))
    asks |= text & (trains(spans.kinds) == TRAIN_NO)
    asking = np.bincount(place[asks], minlength=int(place.max(initial=0)) + 1) > 0
    found: Flags = asks | (text & ~asking[place])
    return found


def hash_runs(ids: NDArray[np.integer], size: int) -> Hashes:
    """[ids] A hash of the `size` ids from each place on; meaningless where fewer are left.

    A polynomial in `_STEP` over random numbers for the ids, put together from runs of 1, 2, 4, ... ids:
    hash(ab) = hash(a) * _STEP ** len(b) + hash(b).
    """
    if len(ids) == 0:
        return np.empty(0, np.uint64)
    block: Hashes = _numbers(int(ids.max()).bit_length())[ids]
    found, covered, length = block, 0, 1
    while True:
        if size & length:
            found = _behind(found, block, covered, length) if covered else block
            covered += length
        if covered == size:
            return found
        block = _behind(block, block, length, length)
        length *= 2


def _behind(one: Hashes, other: Hashes, places: int, length: int) -> Hashes:
    """Hashes of runs that are one of `one` and, `places` further, one of `other`, which is `length` long."""
    found = one * np.uint64(pow(int(_STEP), length, 1 << 64))
    if places < len(found):
        found[:-places] += other[places:]
    return found


@lru_cache(4)
def _numbers(bits: int) -> Hashes:
    """[2 ** bits] A random number for every id: the outputs of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        numbers = np.arange(1, (1 << bits) + 1, dtype=np.uint64) * _STEP
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return numbers ^ (numbers >> np.uint64(31))
