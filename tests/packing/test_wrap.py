"""Wrapping: every token once and in order, sequences full, the same on every machine."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packing.plan import Plan
from packing.wrap import Pieces, wrap

Token = tuple[int, int]
"""A document's number, and the place in it."""


def read(pieces: Pieces, plan: Plan) -> list[list[list[Token]]]:
    """The tokens of each piece of each sequence, in training order."""
    columns = zip(pieces.document.tolist(), pieces.begin.tolist(), pieces.length.tolist(), strict=True)
    tokens = [[(document, at) for at in range(begin, begin + length)] for document, begin, length in columns]
    return [[tokens[n] for n in plan.documents[a:b].tolist()] for a, b in pairwise(plan.offsets.tolist())]


def by_hand(lengths: list[int], order: list[int], capacity: int) -> list[list[Token]]:
    """One text of all documents, cut where a sequence is full; no sequence but the first has a single token."""
    text = [(number, at) for number in order for at in range(lengths[number])]
    cuts = list(range(capacity, len(text), capacity))
    if cuts and len(text) - cuts[-1] == 1:
        cuts[-1] -= 1
    return [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    capacity=st.integers(3, 12),
    global_batch=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_sequences_are_one_text_cut_where_they_are_full(
    lengths: list[int], capacity: int, global_batch: int, seed: int
) -> None:
    def made(global_batch: int) -> list[list[Token]]:
        found = read(*wrap(np.array(lengths), capacity, global_batch=global_batch, seed=seed))
        return [[token for piece in pieces for token in piece] for pieces in found]

    in_order = made(10_000)  # a step of all sequences has them as they stand in the text
    order = list(dict.fromkeys(number for sequence in in_order for number, _ in sequence))
    assert sorted(order) == list(range(len(lengths)))
    assert in_order == by_hand(lengths, order, capacity)
    shuffled = made(global_batch)
    assert sorted(shuffled) == sorted(in_order)
    for at in range(0, len(shuffled), global_batch):
        step = [len(sequence) for sequence in shuffled[at : at + global_batch]]
        assert step == sorted(step, reverse=True), "ranks are dealt the costly ones first"


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=25),
    capacity=st.integers(3, 12),
    global_batch=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_windows_are_wrapped_by_themselves(
    documents: list[tuple[int, int]], capacity: int, global_batch: int, seed: int
) -> None:
    lengths, windows = np.array(documents, np.int64).reshape(-1, 2).T
    pieces, plan = wrap(lengths, capacity, global_batch=global_batch, seed=seed, windows=windows)
    tiles = zip(pieces.document.tolist(), pieces.begin.tolist(), pieces.length.tolist(), strict=True)
    tokens = [(number, at) for number, begin, length in tiles for at in range(begin, begin + length)]
    assert tokens == [(number, at) for number, length in enumerate(lengths) for at in range(length)], "as they stand"
    sequences = read(pieces, plan)
    assert sorted(token for sequence in sequences for piece in sequence for token in piece) == tokens
    assert plan.windows[0] == 0 and plan.windows[-1] == len(plan) == len(sequences)
    for window, (low, high) in enumerate(pairwise(plan.windows.tolist())):
        own = sequences[low:high]
        assert {piece[0][0] for sequence in own for piece in sequence} == set(np.flatnonzero(windows == window))
        total = int(lengths[windows == window].sum())
        sizes = sorted((sum(map(len, sequence)) for sequence in own), reverse=True)
        assert sizes == [len(each) for each in by_hand([total], [0], capacity) if each]
        for before, after in (pair for sequence in own for pair in pairwise(sequence)):
            assert before[-1][1] + 1 == lengths[before[-1][0]] and after[0][1] == 0, "only an end is followed by others"


def test_the_seed_alone_decides() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 500)

    def made(seed: int) -> list[list[list[Token]]]:
        return read(*wrap(lengths, 64, global_batch=4, seed=seed))

    assert made(3) == made(3) != made(4)
    first = [sequence[0][0] for sequence in made(3)]
    assert first != sorted(first), "documents are shuffled"


def test_the_pieces_of_a_long_document_are_spread_over_the_steps() -> None:
    lengths = np.array([64 * 20, *[64] * 60])
    pieces, plan = wrap(lengths, 64, global_batch=4, seed=0)
    holding = [any(piece[0][0] == 0 for piece in sequence) for sequence in read(pieces, plan)]
    steps = [sum(holding[at : at + 4]) for at in range(0, len(holding), 4)]
    assert sum(steps) == 20
    assert max(steps) <= 3 and sum(count > 0 for count in steps) >= 12


@pytest.mark.parametrize(
    ("lengths", "capacity", "told"), [([3, 0], 8, "document 1 has no tokens"), ([3], 2, "capacity")]
)
def test_what_cannot_be_wrapped_is_named(lengths: list[int], capacity: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        wrap(np.array(lengths), capacity, global_batch=1, seed=0)
