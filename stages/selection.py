"""Which rows train, which are held out, why the others are dropped, and how often a row is taken.

A row's own hash decides wherever chance would: adding data moves no other row to another side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.tables import Numbers
from stages.tokenized import Flags, Rows, Shard

REASONS = (
    "overlong",
    "nothing to train on",
    "in held-out",
    "duplicate",
    "identical sides",
    "near-duplicate",
    "contaminated",
    "beyond the limit",
    "not sampled",
)
"""Why pack drops a row, and the order in which reasons are looked for."""
KEPT, OVERLONG, NOTHING, IN_HELDOUT, DUPLICATE, EQUAL_SIDES, NEAR_DUPLICATE, CONTAMINATED, LIMITED, UNSAMPLED = range(
    len(REASONS) + 1
)

Reasons = NDArray[np.uint8]

LIMITING, SAMPLING, SHOWING = 1, 2, 3
"""What a row is drawn for: draws that must not depend on each other."""


@dataclass(frozen=True)
class Taken:
    """What becomes of every row."""

    heldout: Flags
    """[rows]"""
    reasons: Reasons
    """[rows] Why it is dropped, or KEPT."""
    copies: Numbers
    """[rows] How often it trains: 0 where it is dropped or held out."""
    like: Mapping[int, tuple[int, float]]
    """Near-duplicates and contaminated rows -> the row that each is like, and how much."""
    too_short: int
    """Held-out rows whose question is too short to be looked for in those that train."""

    @property
    def kept(self) -> Flags:
        """[rows] Which train or are held out."""
        found: Flags = self.reasons == KEPT
        return found


def held_out(rows: Rows, shards: Sequence[Shard], fractions: Sequence[float]) -> Flags:
    """[rows] Which are held out: those of held-out sources, and those whose identity, read as a number, is among the
    lowest of all numbers: the share of its source in `fractions` [shards]."""
    of_source = np.array([shard.split == "heldout" for shard in shards])
    bounds = np.array([int(fraction * 2**64) for fraction in fractions], np.uint64)
    held: Flags = of_source[rows.shard] | (_halves(rows.identity)[:, 0] < bounds[rows.shard])
    return held


def drop_reasons(
    rows: Rows, heldout: Flags, limit: int | None, turns: Numbers | None, must_train: bool = True
) -> NDArray[np.uint8]:
    """[rows] KEPT, or why the row is dropped, as far as it can be told from its own numbers and from equal rows.

    `limit` is the most tokens a row may have; None if rows are cut. Of rows that say the same, and of which the same
    trains, the first by `turns` [rows] stays; None keeps all. With `must_train`, a row with nothing to train on in one
    of its sequences is of no use; one without a token never is.
    """
    reasons = np.full(len(rows), KEPT, np.uint8)
    if limit is not None:
        reasons[rows.length.sum(axis=1) > limit] = OVERLONG
    needed = rows.trained if must_train else rows.length
    reasons[(reasons == KEPT) & (needed == 0).any(axis=1)] = NOTHING
    texts = _halves(rows.identity)[:, 0]
    reasons[(reasons == KEPT) & ~heldout & np.isin(texts, texts[heldout])] = IN_HELDOUT
    if turns is not None:
        left = np.flatnonzero(reasons == KEPT)
        left = left[np.argsort(turns[left], kind="stable")]
        reasons[left[_seen_before(_told_apart(rows, left))]] = DUPLICATE
    return reasons


def precedence(weights: Sequence[float], limits: Sequence[int | None]) -> Numbers:
    """[sources] Whose of several equal rows stays, lowest first: one that is taken at all before one that may not be,
    the heavier before the lighter. A source that is switched off takes no row from another."""
    keys = [(weight == 0, limit is not None, -weight) for weight, limit in zip(weights, limits, strict=True)]
    order = sorted(set(keys))
    return np.array([order.index(key) for key in keys], np.int64)


def beyond_limit(
    rows: Rows, training: Flags, sources: Sequence[str], limits: Sequence[int | None], seed: int
) -> Numbers:
    """The numbers of those `training` rows [rows] that are more than their source's limit.

    `sources` and `limits` [shards] say whose rows a shard holds, and how many of them may train. Those with the lowest
    hashes stay: a fair sample wherever they stand in the files, of which each new row pushes out one at most.
    """
    drawn = draws(rows, seed, LIMITING)
    beyond = [np.empty(0, np.int64)]
    for source, limit in sorted({(s, n) for s, n in zip(sources, limits, strict=True) if n is not None}):
        own = np.flatnonzero(training & np.array([s == source for s in sources])[rows.shard])
        beyond.append(own[np.argsort(drawn[own], kind="stable")][limit:])
    return np.concatenate(beyond)


def copies(rows: Rows, weights: Sequence[float], seed: int) -> Numbers:
    """[rows] How often each is taken. `weights` [shards] are their sources': 2.5 is two times, and a third time for
    the half of the rows whose hash says so."""
    whole = np.floor(weights).astype(np.int64)
    bounds = np.array([int(weight % 1 * 2**64) for weight in weights], np.uint64)
    more = draws(rows, seed, SAMPLING) < bounds[rows.shard]
    taken: Numbers = whole[rows.shard] + more
    return taken


def windows(shards: Sequence[Shard], tokens: Numbers, size: int | None, seed: int) -> Numbers:
    """[shards] The window each is in, counted from 0: of `size` tokens or a shard more, the last perhaps of fewer;
    `tokens` [shards] is how many each has.

    Every source is spread evenly over the windows, its shards in an order drawn from the seed, so that each window
    has about the mix of the whole.
    """
    if size is None:
        return np.zeros(len(shards), np.int64)
    position = np.full(len(shards), 2.0)  # those that nobody reads come last
    random = np.random.PCG64(seed)
    sources = np.array([shard.source for shard in shards])
    for source in sorted(set(sources.tolist())):
        own = np.flatnonzero((sources == source) & (tokens > 0))
        order = np.argsort(random.random_raw(len(own)))
        position[own[order]] = (np.arange(len(own)) + 0.5) / max(1, len(own))
    window = np.zeros(len(shards), np.int64)
    number = held = 0
    for shard in np.argsort(position, kind="stable").tolist():
        if held >= size and tokens[shard] > 0:
            number, held = number + 1, 0
        window[shard] = number
        held += int(tokens[shard])
    return window


def _halves(identity: pa.Array) -> NDArray[np.uint64]:
    """[rows, 2] Identities as two numbers each."""
    both = np.frombuffer(identity.buffers()[1] or b"", ">u8")[identity.offset * 2 :][: 2 * len(identity)]
    return both.astype(np.uint64).reshape(-1, 2)


def _told_apart(rows: Rows, numbers: Numbers) -> pa.Array:
    """[numbers] What those rows say and which of it trains, as 24 bytes each."""
    ranges = rows.ranges.sum(axis=1)
    mixed = (rows.starts.astype(np.uint64) << np.uint64(32)) + rows.ends
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    sums = np.append(np.uint64(0), np.cumsum(mixed * np.uint64(0xBF58476D1CE4E5B9), dtype=np.uint64))
    last = np.cumsum(ranges)
    trains = (sums[last] - sums[last - ranges])[numbers]
    both = np.column_stack([_halves(rows.identity.take(pa.array(numbers))), trains])
    return pa.Array.from_buffers(pa.binary(24), len(numbers), [None, pa.py_buffer(np.ascontiguousarray(both))])


def draws(rows: Rows, seed: int, purpose: int) -> NDArray[np.uint64]:
    """[rows] A number of 64 random bits each, from the row's identity and the seed: SplitMix64 (Steele et al. 2014).

    It starts from the half of the identity that does not decide what is held out.
    """
    with np.errstate(over="ignore"):
        found = _halves(rows.identity)[:, 1] + np.uint64((2 * seed + 1) * (0x9E3779B97F4A7C15 + purpose) % 2**64)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return found ^ (found >> np.uint64(31))


def _seen_before(identities: pa.Array) -> Flags:
    """Which items equal an earlier one. Arrow numbers distinct items as they first appear, so a new item is one whose
    number is higher than all before."""
    numbers = identities.dictionary_encode().indices.to_numpy()
    highest = np.maximum.accumulate(numbers)
    return np.append(False, numbers[1:] <= highest[:-1])[: len(numbers)]
