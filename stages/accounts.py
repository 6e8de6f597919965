"""The books of pack: what became of every row of every source, for the data report."""

from collections.abc import Sequence

import numpy as np

from stages.data_report import Source, added, joined
from stages.marks import ROLES
from stages.selection import REASONS, Taken
from stages.tables import Numbers
from stages.tokenized import Flags, Rows, Shard

PLACES = 10
"""Dropped rows listed by place, for each reason and source."""


def sources(shards: Sequence[Shard], rows: Rows, taken: Taken, trained: Numbers) -> list[Source]:
    """One account a source, by name. `trained` [rows] counts the trained tokens of all copies of each."""
    return [_account(name, shards, rows, taken, trained) for name in sorted({shard.source for shard in shards})]


def _account(name: str, shards: Sequence[Shard], rows: Rows, taken: Taken, trained: Numbers) -> Source:
    own = [shard for shard in shards if shard.source == name]
    of_source = np.array([shard.source == name for shard in shards])
    mine = of_source[rows.shard]
    dropped = added([shard.counts["dropped"] for shard in own])
    for code, reason in enumerate(REASONS, 1):
        if count := int((mine & (taken.reasons == code)).sum()):
            dropped[reason] = dropped.get(reason, 0) + count
    kept, copies = mine & taken.kept, taken.copies[mine]
    return Source(
        name=name,
        split=own[0].split,
        rows=sum(shard.counts["rows"] for shard in own),
        dropped=dropped,
        places=joined([*(shard.places for shard in own), _places(mine, shards, rows, taken)]),
        unwritten=added([shard.counts.get("unwritten", {}) for shard in own]),
        unread=added([shard.counts.get("unread", {}) for shard in own]),
        absent=sorted(set.intersection(*({*shard.counts.get("absent", ())} for shard in own))),
        turns_without_end=sum(shard.counts.get("turns_without_end", 0) for shard in own),
        ends_in_words=sorted({shard.counts["end_in_words"] for shard in own if "end_in_words" in shard.counts}),
        control_as_text=sum(shard.counts.get("control_as_text", 0) for shard in own),
        packed=int((kept & ~taken.heldout).sum()),
        heldout=int((kept & taken.heldout).sum()),
        taken=int(copies.sum()),
        truncated=int((kept & (rows.length != rows.used).any(axis=1)).sum()),
        tokens=int((rows.used[mine].sum(axis=1) * copies).sum()),
        trained_tokens=int(trained[mine].sum()),
        said={role: int(n) for role, n in zip(ROLES, rows.said[of_source].sum(axis=0), strict=True) if role and n},
        sequences=int(mine.sum()) * rows.sequences,
        own_ends=all(shard.counts.get("own_ends", False) for shard in own),
        endings=int(rows.endings[of_source].sum()),
        unanswered=int(rows.unanswered[of_source].sum()),
        opened=int(rows.opened[of_source].sum()),
        empty=int(rows.empty[of_source].sum()),
    )


def _places(mine: Flags, shards: Sequence[Shard], rows: Rows, taken: Taken) -> dict[str, list[str]]:
    """Where the first rows are that pack drops, by reason."""

    def place(number: int) -> str:
        shard: Shard = shards[int(rows.shard[number])]
        return shard.place(int(rows.number[number]))

    def told(number: int) -> str:
        if number not in taken.like:
            return place(number)
        other, part = taken.like[number]
        return f"{place(number)} (like {place(other)}: {part:.0%})"

    found = {}
    for code, reason in enumerate(REASONS, 1):
        numbers = np.flatnonzero(mine & (taken.reasons == code))[:PLACES].tolist()
        if numbers:
            found[reason] = [told(number) for number in numbers]
    return found
