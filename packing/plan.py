"""The plan: which packed sequence each document goes into, and in which order training reads them.

Packing fills bins of `capacity` tokens with whole documents. The plan is *best-fit decreasing*: documents from long to
short, each into the bin with the least space that still holds it, else into a new bin. It is global (all documents at
once) and an index (no token is copied).

It runs on the histogram of lengths, not on documents, and gives the same bins as the one-by-one greedy rule. Documents
of one length are alike, and so are bins with the same space left, so whole runs of bins take documents at once:

    capacity 10, documents of lengths 6 6 6 4 4 4 4
    length 6, three documents: no bin is open, so bins 0-2 take one each and have 4 left.
    length 4, four documents: the least space >= 4 is 4, in bins 0-2, which take one each and are full;
                              one document remains, opens bin 3, and leaves 6.
    Two lengths, three steps, whatever the counts. Python loops over steps; NumPy writes the documents.

A bin takes several documents of one length in a row when it can (space 9, length 4: two of them), because after
the first it is the bin with the least space that fits. A run therefore hands out `space // length` at a time.

Cost: sorting, plus one pass over the documents, plus about one microsecond for each step.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Plan", "arrange", "deal", "pack"]

CHUNK = 1 << 18
"""Documents written at once: bounds the memory of intermediate arrays."""


@dataclass(frozen=True)
class Plan:
    """Bins in step order, as an index into the packed lengths (compressed sparse rows)."""

    documents: NDArray[np.uint32]
    """[documents] Document numbers, bin after bin; within a bin from long to short."""
    offsets: NDArray[np.int64]
    """[bins + 1] Bin b holds `documents[offsets[b]:offsets[b + 1]]`."""
    windows: NDArray[np.int64]
    """[windows + 1] Window w holds the bins from `windows[w]` up to `windows[w + 1] - 1`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack(
    lengths: NDArray[np.integer],
    capacity: int,
    *,
    global_batch: int,
    seed: int,
    max_documents: int | None = None,
    windows: NDArray[np.integer] | None = None,
) -> Plan:
    """Pack documents into bins of `capacity` tokens and order the bins for training.

    `lengths` [documents] counts tokens, each from 1 to `capacity`. No bin holds more than `max_documents`. `seed`
    decides which of several documents of one length goes where, and the order of the bins; it never changes how many
    bins there are. The same arguments give the same plan on every machine.

    The bins stand in training order: `global_batch` consecutive bins are one optimizer step, the last may be short.
    Every step gets one bin of each cost class, costliest first; see `arrange` and `deal`.

    `windows` [documents] numbers the window of each, from 0: a window is packed by itself, and its bins stand before
    the next one's, so that what is read can be fetched and forgotten a window at a time. Only a step at the border of
    two windows takes bins of both, those of the first before those of the second.

    Raises ValueError naming the first document whose length is out of range.
    """
    if capacity < 1 or global_batch < 1 or (max_documents is not None and max_documents < 1):
        raise ValueError("capacity, global_batch and max_documents must be at least 1")
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        first = int(((lengths < 1) | (lengths > capacity)).argmax())
        raise ValueError(f"document {first} has {int(lengths[first])} tokens: expected 1 to {capacity}")

    random = np.random.PCG64(seed)
    most = max_documents or len(lengths)
    if windows is None:
        documents, offsets = _window(lengths, capacity, global_batch, 0, most, random)
        return Plan(documents, offsets, np.array([0, len(offsets) - 1]))
    parts = [np.empty(0, np.uint32)]
    ends = [np.zeros(1, np.int64)]
    packed, borders = 0, [0]
    by_window = np.argsort(windows, kind="stable").astype(np.uint32)
    for chosen in np.split(by_window, np.cumsum(np.bincount(windows))[:-1]):
        documents, offsets = _window(lengths[chosen], capacity, global_batch, borders[-1], most, random)
        parts.append(chosen[documents])
        ends.append(packed + offsets[1:])
        packed += len(chosen)
        borders.append(borders[-1] + len(offsets) - 1)
    return Plan(np.concatenate(parts), np.concatenate(ends), np.array(borders))


def _window(
    lengths: NDArray[np.integer], capacity: int, global_batch: int, before: int, most: int, random: np.random.PCG64
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The documents and offsets of one window's bins, which stand behind `before` bins of other windows."""
    if len(lengths) == 0:
        return np.empty(0, np.uint32), np.zeros(1, np.int64)
    steps, bins = _best_fit(_histogram(lengths, capacity), capacity, most)
    order = arrange(_per_bin(steps, steps.take * steps.length**2, bins), global_batch, before, random)
    counts = _per_bin(steps, steps.take, bins)
    offsets = np.zeros(bins + 1, np.int64)
    np.cumsum(counts[order], out=offsets[1:])
    begin = np.empty(bins, np.int64)
    begin[order] = offsets[:-1]
    return _place(_longest_first(lengths, capacity, random), steps, begin), offsets


def deal(bins: int, ranks: int) -> list[list[int]]:
    """Which of a step's bins (numbers from 0) each rank computes: there and back again, like dealing cards.

    A step's bins stand from costly to cheap, so with 3 ranks bins 0..7 go to ranks 0 1 2 2 1 0 0 1. Whatever the
    number of ranks, two of them that get equally many bins differ by no more attention cost than the costliest and
    the cheapest bin of the step: what a rank gains over another in one round, it gives back in the next.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for number in range(bins):
        turn, place = divmod(number, ranks)
        hands[place if turn % 2 == 0 else ranks - 1 - place].append(number)
    return hands


@dataclass(frozen=True)
class _Steps:
    """What best-fit decreasing did: in each step `bins` consecutive bins took `take` documents of `length` each."""

    first: NDArray[np.int64]
    """The first bin."""
    bins: NDArray[np.int64]
    take: NDArray[np.int64]
    held: NDArray[np.int64]
    """Documents that each of those bins held before."""
    length: NDArray[np.int64]


def _histogram(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """[capacity + 1] How many documents there are of each length."""
    counts = np.zeros(capacity + 1, np.int64)
    for begin in range(0, len(lengths), CHUNK):
        counts += np.bincount(lengths[begin : begin + CHUNK], minlength=capacity + 1)
    return counts


def _best_fit(counts: NDArray[np.int64], capacity: int, most: int) -> tuple[_Steps, int]:
    """Best-fit decreasing over a histogram: the steps, and how many bins were opened.

    `runs[space]` is a stack of (first bin, number of bins, documents in each) with that much space left, and bit
    `space` of `open_spaces` says that the stack is not empty: shifting it right by a length and looking at the lowest
    set bit finds the least space that fits.
    """
    runs: list[list[tuple[int, int, int]]] = [[] for _ in range(capacity + 1)]
    open_spaces = 0
    opened = 0
    steps: list[tuple[int, int, int, int, int]] = []
    occurring = np.flatnonzero(counts)
    shortest = int(occurring[0])
    for length, count in zip(occurring[::-1].tolist(), counts[occurring[::-1]].tolist(), strict=True):
        while count:
            fitting = open_spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                first, bins, held = runs[space].pop()
            else:
                space, first, bins, held = capacity, opened, count, 0
            take = min(space // length, most - held, count)
            used = min(bins, count // take)
            count -= take * used
            steps.append((first, used, take, held, length))
            if not fitting:
                opened += used
            elif used < bins:
                runs[space].append((first + used, bins - used, held))
            elif not runs[space]:
                open_spaces ^= 1 << space
            left = space - take * length
            if left >= shortest and held + take < most:
                runs[left].append((first, used, held + take))
                open_spaces |= 1 << left
    return _Steps(*np.array(steps, np.int64).T), opened


def _per_bin(steps: _Steps, values: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """[bins] The sum over the steps of each bin: every step adds its value to a run of bins, so add where the run
    begins, subtract where it has ended, and sum up from the left."""
    change = np.zeros(bins + 1, np.int64)
    np.add.at(change, steps.first, values)
    np.subtract.at(change, steps.first + steps.bins, values)
    return np.cumsum(change[:-1])


def arrange(costs: NDArray[np.int64], global_batch: int, before: int, random: np.random.PCG64) -> NDArray[np.int64]:
    """[bins] Bin numbers in training order, behind `before` bins of other windows.

    Attention costs a bin the sum of its documents' squared lengths. Sorted by cost, the bins are cut into
    `global_batch` classes with one bin a step in each, and every class is shuffled over the steps by itself:

        costs 9 8 7 6 5 4 3 2, two bins a step: classes 9 8 7 6 | 5 4 3 2, shuffled 7 9 6 8 | 4 2 5 3
        -> steps (7 4) (9 2) (6 5) (8 3)

    So each step is a fair sample of long and short documents, and two steps differ by no more than the costliest and
    the cheapest bin do: the classes' ranges do not overlap. Bins that do not fill a step are taken evenly from the
    whole range: some complete the step that the window before began, the others form the last one.
    """
    ranked = np.argsort(-costs, kind="stable")
    bins = len(ranked)
    begun = min(-before % global_batch, bins)
    rest = (bins - begun) % global_batch
    apart = _evenly(begun + rest, bins)
    opening = np.zeros(len(apart), np.bool_)
    opening[_evenly(begun, len(apart))] = True
    classes = np.delete(ranked, apart).reshape(global_batch, -1)
    shuffled = np.argsort(random.random_raw(classes.size).reshape(classes.shape), axis=1)
    steps = np.take_along_axis(classes, shuffled, axis=1).T.ravel()
    return np.concatenate([ranked[apart[opening]], steps, ranked[apart[~opening]]])


def _evenly(count: int, of: int) -> NDArray[np.int64]:
    """`count` numbers below `of`, evenly apart: the middles of so many equal pieces."""
    return (2 * np.arange(count) + 1) * of // max(1, 2 * count)


def _longest_first(lengths: NDArray[np.integer], capacity: int, random: np.random.PCG64) -> NDArray[np.uint32]:
    """[documents] Document numbers from long to short, in random order among equals.

    One sort of 64-bit keys made of (capacity - length, random bits, document number). The number makes keys distinct,
    so every sorting method gives the same order.
    """
    number_bits = len(lengths).bit_length()
    random_bits = 64 - number_bits - capacity.bit_length()
    assert number_bits <= 32 and random_bits >= 0, "too many documents for one plan"
    keys = np.empty(len(lengths), np.uint64)
    for begin in range(0, len(lengths), CHUNK):
        part = keys[begin : begin + CHUNK]
        np.subtract(np.uint64(capacity), lengths[begin : begin + CHUNK].astype(np.uint64), out=part)
        part <<= np.uint64(random_bits)
        part |= random.random_raw(len(part)) >> np.uint64(64 - random_bits) if random_bits else np.uint64(0)
        part <<= np.uint64(number_bits)
        part |= np.arange(begin, begin + len(part), dtype=np.uint64)
    keys.sort()
    numbers = np.empty(len(lengths), np.uint32)
    for begin in range(0, len(lengths), CHUNK):
        numbers[begin : begin + CHUNK] = keys[begin : begin + CHUNK] & np.uint64((1 << number_bits) - 1)
    return numbers


def _place(sorted_documents: NDArray[np.uint32], steps: _Steps, begin: NDArray[np.int64]) -> NDArray[np.uint32]:
    """[documents] Every document at its place: `begin` [bins] is where each bin's documents start.

    The steps use up the documents from left to right. The i-th document of a step goes to bin `first + i // take`,
    behind the documents the bin held already and the `i % take` it got in this step.
    """
    placed = np.empty_like(sorted_documents)
    starts = np.zeros(len(steps.first) + 1, np.int64)
    np.cumsum(steps.bins * steps.take, out=starts[1:])
    for low in range(0, len(placed), CHUNK):
        high = min(low + CHUNK, len(placed))
        some = slice(int(np.searchsorted(starts, low, "right")) - 1, int(np.searchsorted(starts, high, "left")))
        sizes = np.minimum(starts[1:][some], high) - np.maximum(starts[:-1][some], low)
        step = np.repeat(np.arange(some.start, some.stop), sizes)
        bin_of_step, behind = np.divmod(np.arange(low, high) - starts[step], steps.take[step])
        placed[begin[steps.first[step] + bin_of_step] + steps.held[step] + behind] = sorted_documents[low:high]
    return placed
