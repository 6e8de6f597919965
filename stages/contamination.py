"""Decontamination: rows that hold the question of a held-out row would make its score worthless.

A question is what the user and tools say in a held-out row, and its raw text that is said not to train; in a row of
nothing but text that may train, all of it. It is compared by its runs of eight tokens, as Tülu 3 does (Lambert et al.
2024, section 3.2): a training row is contaminated when it holds at least a given share of some question's runs,
wherever they stand, and no fewer than thirteen of them; where a question has fewer, all of them, because two short
questions of one kind may share half of their words. Wording that many questions have in common, such as the instruction
that every row begins with, tells nothing and does not count; many answers to one question are no such wording. What
more than half of the questions that train have in common is, be they ever so few.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.grams import Hashes, read_grams
from stages.tables import Numbers
from stages.tokenized import Files, Flags, Rows, Shard, consecutive

RUN = 8
"""Tokens in a run."""
FEWEST = 13
"""Runs that a row must share with a question, unless the question has fewer."""
COMMON, COMMON_SHARE = 10, 0.01
"""A run is wording when more questions, or rows' system prompts, than both allow hold it, of those that train or of
those held out: however many answers each has."""


@dataclass(frozen=True)
class Contamination:
    """Which training rows hold which held-out row's question."""

    rows: dict[int, tuple[int, float]]
    """A training row's number -> the held-out row it holds most of, and how much."""
    too_short: Numbers
    """The numbers of held-out rows that cannot be looked for: no run of their question is their own."""


def find_contamination(
    files: Files, shards: Sequence[Shard], rows: Rows, heldout: Flags, training: Flags, share: float
) -> Contamination:
    """Look for every question of the `heldout` rows [rows] in the `training` rows [rows]."""
    asked, item, those = _pairs(files, shards, rows, heldout, None)
    known = np.unique(asked)
    if len(known) == 0:
        return Contamination({}, np.flatnonzero(heldout))
    found, row, these = _pairs(files, shards, rows, training, known)
    common = _wording(asked, known, those) | _wording(found, known, these) | _always(found, known, these)
    own = ~common[np.searchsorted(known, asked)]
    asked, item = asked[own], item[own]
    own = ~common[np.searchsorted(known, found)]
    found, row = found[own], row[own]
    items, sizes = np.unique(item, return_counts=True)
    held = _held(found, row, asked, np.searchsorted(items, item), len(items))
    best: dict[int, tuple[int, float]] = {}
    for key, count in zip(*held, strict=True):
        number, place = divmod(int(key), len(items))
        part = int(count) / int(sizes[place])
        enough = part >= share and count >= min(FEWEST, sizes[place])
        if enough and part > best.get(number, (0, 0.0))[1]:
            best[number] = (int(items[place]), part)
    return Contamination(best, np.setdiff1d(np.flatnonzero(heldout), items, assume_unique=True))


class _Holders(NamedTuple):
    """What holds runs, see `Grams`."""

    of_runs: Hashes
    """[runs]"""
    questions: Hashes
    """All there are, each once."""


def _pairs(
    files: Files, shards: Sequence[Shard], rows: Rows, wanted: Flags, known: Hashes | None
) -> tuple[Hashes, Numbers, _Holders]:
    """Runs and the rows that hold them, each pair once: of questions, or of anything said the runs that are `known`.
    And what holds them."""
    runs, numbers, holders = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    questions, fresh, waiting = np.empty(0, np.uint64), list[Hashes](), 0
    filter_ = None if known is None else _filter(known)
    for grams in read_grams(files, shards, rows, wanted, RUN, only_asked=known is None):
        places = (
            np.arange(len(grams.hashes))
            if filter_ is None
            else np.flatnonzero(filter_[_address(grams.hashes, filter_)])
        )
        hashes = grams.hashes[places]
        if known is not None:
            sure = known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
            places, hashes = places[sure], hashes[sure]
        row = grams.rows[np.searchsorted(np.cumsum(grams.counts), places, "right")]
        order = np.lexsort((hashes, row))
        hashes, row = hashes[order], row[order]
        new = np.append(True, (np.diff(row) != 0) | (hashes[1:] != hashes[:-1]))[: len(row)]
        runs.append(hashes[new])
        numbers.append(row[new])
        holders.append(grams.holders[places][order][new])
        fresh.append(grams.questions)
        waiting += len(grams.questions)
        if waiting > len(questions):  # as many again: each is sorted a few times, however many batches there are
            questions, fresh, waiting = np.unique(np.concatenate([questions, *fresh])), [], 0
    questions = np.unique(np.concatenate([questions, *fresh]))
    return np.concatenate(runs), np.concatenate(numbers), _Holders(np.concatenate(holders), questions)


def _filter(known: Hashes) -> Flags:
    """Flags by the highest bits of a hash: false where no known one has them, which settles nearly every look-up."""
    flags = np.zeros(1 << min(28, max(10, (32 * len(known)).bit_length())), np.bool_)
    flags[_address(known, flags)] = True
    return flags


def _address(hashes: Hashes, flags: Flags) -> Hashes:
    return hashes >> np.uint64(65 - len(flags).bit_length())


def _wording(runs: Hashes, known: Hashes, holders: _Holders) -> Flags:
    """[known] Which runs have too many holders to tell any of them."""
    common: Flags = _count(runs, known, holders) > max(COMMON, COMMON_SHARE * len(holders.questions))
    return common


def _always(runs: Hashes, known: Hashes, holders: _Holders) -> Flags:
    """[known] Which runs more than half of the questions hold, in many rows: where all rows answer one question, that
    tells nothing, though it is a single holder."""
    rows = np.bincount(np.searchsorted(known, runs), minlength=len(known))
    common: Flags = (rows > COMMON) & (_count(runs, known, holders) > len(holders.questions) / 2)
    return common


def _count(runs: Hashes, known: Hashes, holders: _Holders) -> Numbers:
    """[known] How many different holders each run has."""
    different, holder = np.unique(holders.of_runs, return_inverse=True)
    pairs = np.unique(np.searchsorted(known, runs) * len(different) + holder)
    return np.bincount(pairs // max(1, len(different)), minlength=len(known))


def _held(
    found: Hashes, row: Numbers, asked: Hashes, item: NDArray[np.integer], items: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`row * items + item` for each two that share runs, and how many: a join of both sides on the run."""
    order = np.argsort(asked, kind="stable")
    asked, item = asked[order], item[order]
    low, high = np.searchsorted(asked, found, "left"), np.searchsorted(asked, found, "right")
    shared = np.repeat(row, high - low) * items + item[consecutive(low, high - low)]
    return np.unique(shared, return_counts=True)
