"""Which rows train, which are held out, which of their tokens train, and why the others are dropped.

Works on columns of numbers, a record batch at a time; token ids stay untouched on disk.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stages.stage import Tell
from stages.tables import (
    NO_TURN,
    ORIGIN_CONTENT,
    ORIGIN_END,
    ROLES,
    TRAIN_UNSET,
    TRAIN_YES,
    origins,
    read_batches,
    roles,
    starts,
    trains,
)

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]

REASONS = ("overlong", "nothing to train on", "in held-out", "duplicate")
"""Why pack drops a row, and the order in which reasons are looked for."""
KEPT, OVERLONG, NOTHING, IN_HELDOUT, DUPLICATE = range(5)


@dataclass(frozen=True)
class Shard:
    """One shard of tokens."""

    path: str
    source: str
    split: str
    counts: Mapping[str, Any]
    """Its `counts.json`: rows read, and rows dropped before this stage."""


@dataclass(frozen=True)
class Rows:
    """All rows of all shards, in order; `trained` ranges are flat, `ranges` of them a row."""

    shard: NDArray[np.uint32]
    place: NDArray[np.uint32]
    """Position in the shard's tokens table."""
    length: Numbers
    """Tokens, before any truncation."""
    identity: pa.Array
    """Fixed 16 bytes each."""
    trained_tokens: Numbers
    ranges: Numbers
    starts: NDArray[np.uint32]
    ends: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.length)


def find_shards(tokens: Path) -> list[Shard]:
    """The shards in a folder that tokenize wrote, by path."""
    shards = []
    for path in sorted(file.parent for file in tokens.rglob("tokens.arrow")):
        counts = json.loads((path / "counts.json").read_text())
        shards.append(Shard(path.relative_to(tokens).as_posix(), counts["source"], counts["split"], counts))
    return shards


def read_rows(tokens: Path, shards: Sequence[Shard], train_on: str, limit: int, tell: Tell) -> Rows:
    """All rows of the shards in the folder `tokens`; see `trained_ranges` for `train_on` and `limit`."""
    parts: list[tuple[Any, ...]] = []
    identities: list[pa.Array] = []
    total = sum(shard.counts["rows"] - sum(shard.counts["dropped"].values()) for shard in shards)
    done = 0
    for number, shard in enumerate(shards):
        place = 0
        for batch in read_batches(tokens / shard.path / "tokens.arrow"):
            count = len(batch)
            parts.append(
                (
                    np.full(count, number, np.uint32),
                    np.arange(place, place + count, dtype=np.uint32),
                    batch.column("ids").value_lengths().to_numpy().astype(np.int64),
                    *trained_ranges(batch, train_on, limit),
                )
            )
            identities.append(batch.column("identity"))
            place += count
        done += place
        tell(done, total, "rows")
    if not parts:
        empty, numbers = np.empty(0, np.int64), np.empty(0, np.uint32)
        return Rows(numbers, numbers, empty, pa.array([], pa.binary(16)), empty, empty, numbers, numbers)
    shard_number, places, lengths, trained, ranges, starts, ends = (
        np.concatenate(part) for part in zip(*parts, strict=True)
    )
    return Rows(shard_number, places, lengths, pa.concat_arrays(identities), trained, ranges, starts, ends)


def trained_ranges(
    batch: pa.RecordBatch, train_on: str, limit: int
) -> tuple[Numbers, Numbers, NDArray[np.uint32], NDArray[np.uint32]]:
    """Which tokens of each row train, within the row's first `limit` tokens.

    Returns trained tokens a row, ranges a row, and the ranges' starts and ends, flat. Ranges that touch are one.
    """
    spans = batch.column("spans")
    counts = spans.value_lengths().to_numpy()
    row = np.repeat(np.arange(len(batch)), counts)
    ends, turns, kinds = (column.to_numpy() for column in spans.flatten().flatten())
    origin, role, flag = origins(kinds), roles(kinds), trains(kinds)
    assistant = role == ROLES.index("assistant")
    if train_on == "all":
        chosen = turns != NO_TURN
    else:
        if train_on == "last":
            last = np.zeros(len(batch), turns.dtype)
            np.maximum.at(last, row[assistant], turns[assistant])
            assistant &= turns == last[row]
        chosen = assistant | (role == ROLES.index("text"))
    train = (origin == ORIGIN_CONTENT) | (origin == ORIGIN_END)
    train &= (flag == TRAIN_YES) | ((flag == TRAIN_UNSET) & chosen)
    begins, ends = np.maximum(starts(ends, counts), 1), np.minimum(ends, limit)
    train &= begins < ends
    begins, ends, row = begins[train], ends[train], row[train]
    apart = np.append(True, (row[1:] != row[:-1]) | (begins[1:] != ends[:-1]))[: len(row)]
    tokens = np.bincount(row, weights=ends - begins, minlength=len(batch)).astype(np.int64)
    ranges = np.bincount(row[apart], minlength=len(batch))
    return tokens, ranges, begins[apart], ends[np.append(apart[1:], True)[: len(row)]]


def held_out(rows: Rows, shards: Sequence[Shard], fraction: float) -> Flags:
    """Which rows are held out: those of held-out sources, and those whose identity, read as a number, is among the
    lowest `fraction` of all numbers."""
    of_source = np.array([shard.split == "heldout" for shard in shards])[rows.shard]
    first_bytes = np.frombuffer(rows.identity.buffers()[1], ">u8")[rows.identity.offset * 2 :][: 2 * len(rows) : 2]
    return of_source | (first_bytes.astype(np.uint64) < np.uint64(int(fraction * 2**64)))


def drop_reasons(rows: Rows, heldout: Flags, limit: int | None, deduplicate: bool) -> NDArray[np.uint8]:
    """[rows] KEPT, or why the row is dropped. `limit` is the most tokens a row may have; None if rows are cut."""
    reasons = np.full(len(rows), KEPT, np.uint8)
    if limit is not None:
        reasons[rows.length > limit] = OVERLONG
    reasons[(reasons == KEPT) & (rows.trained_tokens == 0)] = NOTHING
    known = pc.is_in(rows.identity, value_set=rows.identity.filter(pa.array(heldout))).to_numpy(zero_copy_only=False)
    reasons[(reasons == KEPT) & ~heldout & known] = IN_HELDOUT
    if deduplicate:
        left = np.flatnonzero(reasons == KEPT)
        reasons[left[_seen_before(rows.identity.take(pa.array(left)))]] = DUPLICATE
    return reasons


def _seen_before(identities: pa.Array) -> Flags:
    """Which items equal an earlier one. Arrow numbers distinct items as they first appear, so a new item is one whose
    number is higher than all before."""
    numbers = identities.dictionary_encode().indices.to_numpy()
    highest = np.maximum.accumulate(numbers)
    return np.append(False, numbers[1:] <= highest[:-1])[: len(numbers)]
