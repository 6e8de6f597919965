"""Hashes of runs of tokens (n-grams), by which pack tells which rows say nearly the same.

Runs lie within one content of one turn, so what the chat template writes never counts. They are hashed from the flat
token ids of a record batch at a time: a few NumPy operations a token, and no text is read.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stages.tables import ORIGIN_CONTENT, ROLES, origins, read_batches, roles
from stages.tokenized import Flags, Numbers, Rows, Shard, consecutive, read_spans

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


def read_grams(
    tokens: Path, shards: Sequence[Shard], rows: Rows, wanted: Flags, size: int, said_by: Collection[str]
) -> Iterator[Grams]:
    """The runs of `size` tokens in the `wanted` rows [rows], in what `said_by` roles say, a record batch at a time."""
    speaks = np.array([role in said_by for role in ROLES])
    first = np.searchsorted(rows.shard, np.arange(len(shards) + 1))
    width = rows.sequences
    for number, shard in enumerate(shards):
        low, high = int(first[number]), int(first[number + 1])
        if not wanted[low:high].any():
            continue
        position = 0
        for batch in read_batches(tokens / shard.path / "tokens.arrow"):
            row = low + (position + np.arange(len(batch))) // width
            position += len(batch)
            if wanted[row].any():
                yield _of_batch(batch, row, wanted[row], size, speaks)


def _of_batch(batch: pa.RecordBatch, row: Numbers, wanted: Flags, size: int, speaks: Flags) -> Grams:
    """`row` and `wanted` are of each sequence in the batch."""
    spans = read_spans(batch)
    sequence = spans.sequence
    chosen = wanted[sequence] & (origins(spans.kinds) == ORIGIN_CONTENT) & speaks[roles(spans.kinds)]
    chosen &= spans.ends - spans.starts >= size
    lengths = pc.list_value_length(batch["ids"]).to_numpy().astype(np.int64)
    begins = (np.cumsum(lengths) - lengths)[sequence[chosen]] + spans.starts[chosen]
    counts = (spans.ends - spans.starts)[chosen] - size + 1
    hashes = hash_runs(pc.list_flatten(batch["ids"]).to_numpy(), size)[consecutive(begins, counts)]
    own = np.unique(row[wanted])
    per_row = np.bincount(np.searchsorted(own, row[sequence[chosen]]), weights=counts, minlength=len(own))
    return Grams(own, per_row.astype(np.int64), hashes)


def hash_runs(ids: NDArray[np.integer], size: int) -> Hashes:
    """[ids] A hash of the `size` ids from each place on; meaningless where fewer are left."""
    with np.errstate(over="ignore"):
        each = _mixed(ids.astype(np.uint64) + np.uint64(1))
        found = each.copy()
        for ahead in range(1, min(size, len(each))):
            found *= _STEP
            found[:-ahead] += each[ahead:]
        return _mixed(found)


def _mixed(numbers: Hashes) -> Hashes:
    """Numbers whose bits all depend on all bits of theirs: the finalizer of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return numbers ^ (numbers >> np.uint64(31))
