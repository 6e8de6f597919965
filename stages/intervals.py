"""Confidence intervals for scores: one model's share, and the difference of two models on the same items.

Every interval is two-sided at 95 %. A score of 0 or 1 an item gets the closed forms of Wilson and Newcombe; any other
score, and a ratio such as loss a token, gets a seeded percentile bootstrap. All differences are *paired*: both models
answered the same items, so what counts is where they disagree.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist

from stages.identity import Json

Z = NormalDist().inv_cdf(0.975)
"""Two-sided 95 %."""

RESAMPLES = 10_000

FEWEST = 5
"""Items that a bootstrap needs. Fewer say next to nothing of how they vary: one item alone never does."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    too_few: bool = False
    """Whether it comes of too few items: `low` and `high` are then no interval, only how far the resamples reached."""

    @property
    def document(self) -> dict[str, Json]:
        """As it stands in scores.json, where `too_few` stands only if it is so."""
        told = asdict(self)
        return told if self.too_few else {name: told[name] for name in ("value", "low", "high")}


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval for a share, without continuity correction.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927),
    equation for the roots of (p - x)^2 = z^2 x (1 - x) / n. Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n and n > 0")
    p = successes / n
    scale = 1 + Z * Z / n
    middle = (p + Z * Z / (2 * n)) / scale
    half = Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / scale
    # At the ends the roots are exactly 0 and 1; rounding must not say otherwise.
    return Interval(p, 0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half)


def newcombe(both: int, only_first: int, only_second: int, neither: int) -> Interval:
    """The second share minus the first, for paired yes/no items, by Newcombe's hybrid score interval.

    The counts are those of the 2x2 table: items that both, only the first, only the second, or neither got right.
    Source: R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on
    paired data, Statistics in Medicine 17 (1998), method 10: Wilson's limits of both shares, squared and added, with
    their correlation phi estimated with a continuity correction. Raises ValueError for an empty table.
    """
    n = both + only_first + only_second + neither
    first, second = wilson(both + only_first, n), wilson(both + only_second, n)
    phi = _correlation(both, only_first, only_second, neither)
    difference = second.value - first.value
    below, above = second.value - second.low, first.high - first.value
    down = sqrt(max(0.0, below**2 - 2 * phi * below * above + above**2))
    below, above = first.value - first.low, second.high - second.value
    up = sqrt(max(0.0, below**2 - 2 * phi * below * above + above**2))
    return Interval(difference, max(-1.0, difference - down), min(1.0, difference + up))


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Newcombe's phi: the correlation of the two answers, its numerator drawn n/2 towards 0 when positive."""
    n = both + only_first + only_second + neither
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    excess = both * neither - only_first * only_second
    if excess > 0:
        excess = max(excess - n / 2, 0)  # type: ignore[assignment]
    return excess / sqrt(margins)


def share(scores: Sequence[float]) -> Interval:
    """The mean of a model's scores: Wilson when they are all 0 or 1, else a bootstrap over items."""
    if _binary(scores):
        return wilson(round(sum(scores)), len(scores))
    return mean(scores)


def mean(scores: Sequence[float]) -> Interval:
    """The mean of scores of any size and sign, with a bootstrap over items."""
    return bootstrap(scores, [1.0] * len(scores))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of `second` minus the mean of `first`, item by item.

    Newcombe's method 10 when all scores are 0 or 1, else a bootstrap over items. Raises ValueError when the
    lengths differ or nothing is given.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} scores: a paired difference needs the same items twice")
    if _binary(first) and _binary(second):
        pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
        table = [pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))]
        return newcombe(*table)
    return mean([b - a for a, b in zip(first, second, strict=True)])


def bootstrap(amounts: Sequence[float], weights: Sequence[float]) -> Interval:
    """sum(amounts) / sum(weights), with the percentile interval over resampled items; the seed is fixed.

    With weights of 1 this is a mean; with tokens as weights it is loss a token, resampled by the unit that was packed.
    Of fewer than `FEWEST` items it is marked `too_few`: one item's resamples are all alike, as if it were certain.
    Source: B. Efron, R. Tibshirani, An introduction to the bootstrap (1993), chapter 13.
    """
    if len(amounts) != len(weights) or not amounts:
        raise ValueError(f"{len(amounts)} amounts and {len(weights)} weights: expected as many, and at least one")
    import numpy as np  # here, as `regrow plan` reads this module too

    a, w = np.asarray(amounts, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(0)
    ratios = np.empty(RESAMPLES)
    block = max(1, 4_000_000 // len(a))  # resamples at once: bounds the memory
    for start in range(0, RESAMPLES, block):
        chosen = generator.integers(0, len(a), size=(min(block, RESAMPLES - start), len(a)))
        ratios[start : start + len(chosen)] = a[chosen].sum(axis=1) / w[chosen].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(a.sum() / w.sum()), float(low), float(high), too_few=len(a) < FEWEST)


def _binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)
