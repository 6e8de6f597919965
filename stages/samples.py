"""A few packed rows as text, piece by piece, with what trains told apart from what does not: for people to look at."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from stages.selection import SHOWING, Taken, draws
from stages.tables import read_table
from stages.tokenized import Files, Rows, Shard

SAMPLES = 5
PIECE = 700
"""Characters of a piece; more are left out of its middle."""
PIECES = 24
"""Pieces of a sequence; more are left out after the first half of them."""

Sample = dict[str, Any]
"""`place`, `source` and `sequences`, each a list of pieces `[text, whether it trains]`."""


def samples(
    files: Files, tokenizer_json: str, shards: Sequence[Shard], rows: Rows, taken: Taken, seed: int
) -> list[Sample]:
    """`SAMPLES` rows that train, or as many as there are: one of every source in turn, drawn by the seed."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    drawn = _drawn(shards, rows, taken, seed)
    files.show({shards[rows.shard[number]].path for number in drawn}, ())
    return [_sample(files.tokens, tokenizer, shards, rows, number) for number in drawn]


def _drawn(shards: Sequence[Shard], rows: Rows, taken: Taken, seed: int) -> list[int]:
    """Row numbers: those with the lowest draws of each source, the sources taking turns."""
    drawn = draws(rows, seed, SHOWING)
    by_source = []
    for source in sorted({shard.source for shard in shards}):
        own = np.flatnonzero((taken.copies > 0) & np.array([shard.source == source for shard in shards])[rows.shard])
        few = own[np.argpartition(drawn[own], SAMPLES)[:SAMPLES]] if len(own) > SAMPLES else own
        by_source.append(few[np.argsort(drawn[few], kind="stable")].tolist())
    found = [number for round_ in zip_longest(*by_source) for number in round_ if number is not None]
    return found[:SAMPLES]


def _sample(tokens: Path, tokenizer: Any, shards: Sequence[Shard], rows: Rows, number: int) -> Sample:
    shard = shards[rows.shard[number]]
    table = read_table(tokens / shard.path / "tokens.arrow")
    before = int(rows.ranges[:number].sum())
    sequences = []
    for part in range(rows.sequences):
        ids = table["ids"][int(rows.place[number]) + part].as_py()[: int(rows.used[number, part])]
        count = int(rows.ranges[number, part])
        own = slice(before, before + count)
        before += count
        cuts = sorted({len(ids), *rows.starts[own].tolist(), *rows.ends[own].tolist()})
        sequences.append(_shortened(list(_pieces(tokenizer, ids, cuts))))
    return {"place": shard.place(int(rows.number[number])), "source": shard.source, "sequences": sequences}


def _pieces(tokenizer: Any, ids: list[int], cuts: list[int]) -> Iterator[tuple[str, bool]]:
    """(text, whether it trains) between the cuts, which alternate: a first token never trains.

    Text is decoded from the first token on every time, because some tokenizers write a token in another way where it
    comes first.
    """
    before, trains = "", False
    for cut in cuts:
        text = tokenizer.decode(ids[:cut], skip_special_tokens=False)
        yield text[len(before) :], trains
        before, trains = text, not trains


def _shortened(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    if len(pieces) > PIECES:
        half = PIECES // 2
        left_out = len(pieces) - 2 * half
        pieces = [*pieces[:half], (f" […{left_out} pieces…] ", False), *pieces[-half:]]
    return [(_middle_out(text), trains) for text, trains in pieces]


def _middle_out(text: str) -> str:
    if len(text) <= PIECE:
        return text
    half = PIECE // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
