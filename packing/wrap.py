"""Wrapping: documents one after another, cut where a packed sequence is full and continued in the next one.

The other way to pack (`packing.plan`) keeps documents whole and apart. Here nothing is too long and no space is left:

    capacity 10, documents of lengths 7 9 6, in that order
    -> sequences (7 3) (6 4) (2): the second document goes on after its third token, the last one after its fourth.

Pieces that follow one another in a sequence are one text to the model, which tells documents apart by their end token.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from packing.plan import Plan, arrange

__all__ = ["Pieces", "wrap"]


@dataclass(frozen=True)
class Pieces:
    """What documents were cut into, document after document and each from its first token on: each `[pieces]`."""

    document: NDArray[np.int64]
    """The number of the document."""
    begin: NDArray[np.int64]
    """The first token of the piece within its document."""
    length: NDArray[np.int64]
    """Tokens in the piece, at least one."""


def wrap(
    lengths: NDArray[np.integer],
    capacity: int,
    *,
    global_batch: int,
    seed: int,
    windows: NDArray[np.integer] | None = None,
) -> tuple[Pieces, Plan]:
    """Cut documents into pieces that fill sequences of `capacity` tokens; returns them and a plan whose documents are
    the pieces, which stand in a sequence as they are to be read.

    `lengths` [documents] counts tokens, at least one each; `capacity` is at least 3. `seed` draws the order in which
    documents follow one another, and that of the sequences: `global_batch` consecutive ones are a step, which takes
    them from all over the text. `windows` [documents] numbers the window of each, as in
    `packing.plan.pack`; each is wrapped by itself.

    Every sequence of a window is full but its last. That one never has a single token, which would have nothing to be
    predicted from: the one before it gives it another. The same arguments give the same pieces on every machine.

    Raises ValueError naming the first document without tokens.
    """
    if capacity < 3 or global_batch < 1:
        raise ValueError("capacity must be at least 3 and global_batch at least 1")
    if len(lengths) and lengths.min() < 1:
        raise ValueError(f"document {int((lengths < 1).argmax())} has no tokens")
    random = np.random.PCG64(seed)
    sizes = np.asarray(lengths, np.int64)
    window = np.zeros(len(sizes), np.int64) if windows is None else windows
    found = [np.empty((3, 0), np.int64)]
    counts = [np.empty(0, np.int64)]
    borders = [0]
    for own in np.split(np.argsort(window, kind="stable"), np.cumsum(np.bincount(window))[:-1]):
        pieces, held = _window(sizes, own, capacity, global_batch, borders[-1], random)
        found.append(pieces)
        counts.append(held)
        borders.append(borders[-1] + len(held))
    document, begin, length = np.concatenate(found, axis=1)
    in_order = np.lexsort((begin, document))
    number = np.empty(len(in_order), np.uint32)
    number[in_order] = np.arange(len(in_order), dtype=np.uint32)
    offsets = np.append(0, np.cumsum(np.concatenate(counts)))
    return (
        Pieces(document[in_order], begin[in_order], length[in_order]),
        Plan(number, offsets, np.array(borders)),
    )


def _window(
    lengths: NDArray[np.int64],
    own: NDArray[np.int64],
    capacity: int,
    global_batch: int,
    before: int,
    random: np.random.PCG64,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One window's pieces [3, pieces] (document, begin, length), sequence after sequence in training order, and how
    many each sequence holds. `own` are its documents; its sequences stand behind `before` of other windows."""
    if len(own) == 0:
        return np.empty((3, 0), np.int64), np.empty(0, np.int64)
    order = own[np.argsort(random.random_raw(len(own)), kind="stable")]
    ends = np.cumsum(lengths[order])
    edges = np.append(np.arange(0, ends[-1], capacity), ends[-1])
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        edges[-2] -= 1
    starts = np.union1d(edges[:-1], ends - lengths[order])
    place = np.searchsorted(ends, starts, side="right")
    begins = starts - (ends - lengths[order])[place]
    pieces = np.stack([order[place], begins, np.diff(starts, append=ends[-1])])
    first = np.searchsorted(starts, edges)
    arranged = arrange(np.diff(edges) ** 2, global_batch, before, random)
    held = np.diff(first)[arranged]
    shift = first[arranged] - (np.cumsum(held) - held)
    return pieces[:, np.arange(held.sum()) + np.repeat(shift, held)], held
