"""Pairs whose two answers are the same once they are tokens: where what told them apart was cut off, or was white space
that the chat template trims. No model can learn from them which one was preferred."""

from collections.abc import Sequence

import numpy as np

from stages.tables import Numbers, read_table
from stages.tokenized import Files, Flags, Rows, Shard, by_shard


def equal_sides(files: Files, shards: Sequence[Shard], rows: Rows, looked: Flags) -> Numbers:
    """The numbers of those `looked` rows [rows] whose sequences are the same two times, as far as they are used. Only
    the tokens of pairs with two equally long sides are read."""
    if rows.sequences != 2:
        return np.empty(0, np.int64)
    alike = np.flatnonzero(looked & (rows.used[:, 0] == rows.used[:, 1]))
    own = by_shard(rows.shard[alike], len(shards))
    holding = np.unique(rows.shard[alike]).tolist()
    found: list[int] = []
    for number, shard in zip(holding, files.in_turn([shards[n] for n in holding]), strict=True):
        found += _of_shard(files, shard, rows, alike[own[number]])
    return np.array(found, np.int64)


def _of_shard(files: Files, shard: Shard, rows: Rows, own: Numbers) -> list[int]:
    ids = read_table(files.tokens / shard.path / "tokens.arrow")["ids"]

    def side(row: int, part: int) -> Numbers:
        values: Numbers = ids[int(rows.place[row]) + part].values.to_numpy()
        return values[: rows.used[row, part]]

    return [row for row in own.tolist() if np.array_equal(side(row, 0), side(row, 1))]
