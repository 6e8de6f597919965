"""The steps of a judged solution: found again in its tokens, and those of an answer that is to be judged."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.encoding import Encoder, Spans, Unwritable, carry, encode
from stages.marks import ORIGIN_CONTENT, ORIGIN_END, ORIGIN_TEMPLATE, ROLES, TRAIN_NO, TRAIN_UNSET
from stages.tables import roles, trains


def ends_of(extra: Mapping[str, Any]) -> list[int]:
    """Where each step ends, in tokens, from what a document's `PackedBins.extra` holds: its `spans`, [spans, 3] with
    end, turn and kind. A step is a turn of raw text that is not marked as untrained (see `stages.tables`)."""
    ends, turns, numbers = np.asarray(extra["spans"], np.int64).reshape(-1, 3).T
    kinds = numbers.astype(np.uint8)
    steps = (roles(kinds) == ROLES.index("text")) & (trains(kinds) != TRAIN_NO)
    found = [int(ends[steps & (turns == turn)].max()) for turn in np.unique(turns[steps])]
    assert len(found) == len(extra["labels"]), "a label for every step"
    return found


def judged(extra: Mapping[str, Any], length: int) -> list[tuple[int, bool]]:
    """Where each step ends, and whether it is right: of those that stand whole in the first `length` tokens. What was
    cut off cannot be judged, and its label belongs to no token that is left."""
    ends = zip(ends_of(extra), extra["labels"], strict=True)
    return [(end, bool(label)) for end, label in ends if end <= length]


def cut(answer: str, separator: str) -> list[str]:
    """An answer's steps, without the separators. Nothing but white space between two of them is no step: a blank
    line says nothing that could be right, and convert takes none from the data."""
    return [piece for piece in answer.split(separator) if piece.strip()]


def tokens(encoder: Encoder, prompt: str, steps: Sequence[str], separator: str) -> tuple[list[int], list[int]]:
    """The ids of a rendered prompt with steps after it, and the place of each step's last token, as training has them
    (`stages.formats.stepwise`). Raises ValueError for a step that the tokenizer cannot write."""
    pieces = [(prompt, ORIGIN_TEMPLATE)]
    for step in steps:
        pieces += [(step, ORIGIN_CONTENT), (separator, ORIGIN_END)]
    lengths = np.array([len(text.encode()) for text, _ in pieces], np.int64)
    origins = np.array([origin for _, origin in pieces], np.uint8)
    unset = np.full(len(pieces), TRAIN_UNSET, np.uint8)
    spans, size = (
        Spans(np.cumsum(lengths) - lengths, origins, unset, np.array([len(pieces)])),
        lengths.sum(keepdims=True),
    )
    texts = ["".join(text for text, _ in pieces)]
    try:
        encoded = encode(encoder, texts, size, spans)
    except Unwritable as error:
        raise ValueError(str(error)) from error
    _, ends = carry(spans, size, encoded, texts)
    return encoded.ids.tolist(), (ends[2::2] - 1).tolist()
