"""Near-duplicates: rows whose contents are nearly those of an earlier row.

Similar is measured as the Jaccard similarity of two rows' runs of five tokens (Broder 1997): the runs that both have,
among those that either has. Two steps, so that the cost is linear in the tokens:

1. MinHash signatures (the library rensa) cut into bands: rows that agree in a whole band may be similar.
2. For those alone the similarity itself is computed, so no row is dropped on an estimate.
"""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stages.grams import Grams, Hashes, read_grams
from stages.tables import Numbers, read_table
from stages.tokenized import Files, Flags, Rows, Shard, by_shard

RUN = 5
"""Tokens in a run."""
SIGNATURE = 128
"""Numbers in a MinHash signature."""
RECALL = 0.99
"""The chance that a row just as similar as asked shares a band with the other."""
REPRESENTATIVES = 64
"""Kept rows of one band that a row is compared with: where many rows share some wording, more would take for ever."""


VERDICTS: Mapping[str, Callable[[str], int]] = {
    "unpaired_preference": lambda extra: 1 + bool(json.loads(extra)["label"]),
    "stepwise": lambda extra: 1 + zlib.crc32(extra.encode()),
}
"""What the labels of an answer, or of all its steps, come to as a number; by the kind of rows that have some."""


def near_duplicates(
    files: Files, shards: Sequence[Shard], rows: Rows, order: Numbers, similarity: float, verdicts: Numbers
) -> dict[int, tuple[int, float]]:
    """Of the rows numbered in `order`, those at least so similar to an earlier one that stays, with that one and how
    similar they are. Rows of fewer than `RUN` tokens a turn are similar to none, and neither are two with other
    `verdicts` [rows], unless one of these is 0."""
    wanted = np.zeros(len(rows), np.bool_)
    wanted[order] = True
    found = [(np.empty(0, np.int64), np.empty((0, 1), np.uint64))]
    height = band_height(similarity)
    for grams in read_grams(files, shards, rows, wanted, RUN):
        some = grams.counts > 0
        if some.any():
            found.append((grams.rows[some], _bands(grams, some, height)))
    if len(found) == 1:
        return {}
    numbers, bands = (np.concatenate(each) for each in zip(*found[1:], strict=True))
    shared = np.zeros(len(numbers), np.bool_)
    for band in bands.T:
        shared |= np.bincount(by := np.unique(band, return_inverse=True)[1])[by] > 1
    numbers, bands = numbers[shared], bands[shared]
    wanted[:] = False
    wanted[numbers] = True
    runs = {
        int(row): np.unique(own.astype(np.uint32))
        for grams in read_grams(files, shards, rows, wanted, RUN)
        for row, own in zip(grams.rows, np.split(grams.hashes, np.cumsum(grams.counts)[:-1]), strict=True)
    }
    return _greedy(numbers, bands, runs, order, similarity, verdicts)


def read_verdicts(files: Files, shards: Sequence[Shard], rows: Rows) -> Numbers:
    """[rows] A number for what their labels say, of answers or of steps; 0 where rows are not labelled."""
    found = np.zeros(len(rows), np.int64)
    if (verdict := VERDICTS.get(shards[0].kind)) is None:
        return found
    for own, shard in zip(by_shard(rows.shard, len(shards)), files.in_turn(shards), strict=True):
        extras = read_table(files.tokens / shard.path / "tokens.arrow")["extra"].take(rows.place[own])
        found[own] = [verdict(extra) for extra in extras.to_pylist()]
    return found


def band_height(similarity: float) -> int:
    """Numbers of a signature in a band: as many as still let `RECALL` of such pairs share one."""

    def recall(height: int) -> float:
        return float(1 - (1 - similarity**height) ** (SIGNATURE // height))

    return max((height for height in range(1, 33) if recall(height) >= RECALL), default=1)


def _bands(grams: Grams, some: Flags, height: int) -> Hashes:
    """[rows, bands] One number for each band of a row's signature."""
    from rensa import RMinHash

    offsets = np.append(0, np.cumsum(grams.counts[some])).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(grams.hashes, offsets, SIGNATURE, 0)
    signature = np.array(matrix.to_rows(), np.uint64)
    bands = signature[:, : SIGNATURE // height * height].reshape(len(signature), -1, height)
    found = np.zeros(bands.shape[:2], np.uint64)
    with np.errstate(over="ignore"):
        for column in range(height):
            found = (found ^ bands[:, :, column]) * np.uint64(0x9E3779B97F4A7C15)
            found ^= found >> np.uint64(29)
    return found


def _greedy(
    numbers: Numbers,
    bands: Hashes,
    runs: dict[int, NDArray[np.uint32]],
    order: Numbers,
    similarity: float,
    verdicts: Numbers,
) -> dict[int, tuple[int, float]]:
    """From the first row in `order` to the last: a row stays unless it is similar to one that stays."""
    turn = np.zeros(order.max() + 1, np.int64)
    turn[order] = np.arange(len(order))
    stay: dict[tuple[int, int], list[int]] = {}
    dropped: dict[int, tuple[int, float]] = {}
    for position in np.argsort(turn[numbers]):
        row = int(numbers[position])
        keys = list(enumerate(bands[position].tolist()))
        for other in dict.fromkeys(other for key in keys for other in stay.get(key, ())):
            if 0 != verdicts[row] != verdicts[other] != 0:  # a good and a bad answer to one long question
                continue
            if (found := jaccard(runs[row], runs[other], similarity)) >= similarity:
                dropped[row] = (other, found)
                break
        else:
            for key in keys:
                if len(own := stay.setdefault(key, [])) < REPRESENTATIVES:
                    own.append(row)
    return dropped


def jaccard(one: NDArray[np.uint32], other: NDArray[np.uint32], at_least: float) -> float:
    """The similarity of two sets of sorted numbers; 0 when their sizes alone put it below `at_least`."""
    small, large = sorted((len(one), len(other)))
    if small < at_least * large:
        return 0.0
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
