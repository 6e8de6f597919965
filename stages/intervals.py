"""Confidence intervals for scores: one model's share, and the difference of two models on the same items.

Every interval is two-sided at 95 %. A score of 0 or 1 an item gets the closed forms of Wilson and Newcombe; any other
score, and a ratio such as loss a token, gets a seeded percentile bootstrap; how often a good answer is ahead of a bad
one gets DeLong's variance. All differences are *paired*: both models answered the same items, so what counts is where
they disagree. Items that vary together, such as the steps of one solution, are resampled together: of twelve steps of a
solution one says little that the others do not.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from statistics import NormalDist, fmean, variance

from stages.identity import Json

Z = NormalDist().inv_cdf(0.975)
"""Two-sided 95 %."""

RESAMPLES = 10_000

FEWEST = 5
"""Items, or groups of items that vary together, that an interval needs which learns from them how they vary. Fewer say
next to nothing of that: one alone never does."""


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


def share(scores: Sequence[float], groups: Sequence[int] = ()) -> Interval:
    """The mean of a model's scores from 0 to 1: Wilson when they are all 0 or 1, else a bootstrap over items, or over
    `groups` of them: [items] which group each is in."""
    if _binary(scores) and _apart(groups):
        return wilson(round(sum(scores)), len(scores))
    return _within(mean(scores, groups), 0.0, 1.0)


def mean(scores: Sequence[float], groups: Sequence[int] = ()) -> Interval:
    """The mean of scores of any size and sign, with a bootstrap over items, or over `groups` of them."""
    if _apart(groups):
        return bootstrap(scores, [1.0] * len(scores))
    together: dict[int, list[float]] = {}
    for group, score in zip(groups, scores, strict=True):
        together.setdefault(group, []).append(score)
    return bootstrap([sum(each) for each in together.values()], [float(len(each)) for each in together.values()])


def paired_difference(first: Sequence[float], second: Sequence[float], groups: Sequence[int] = ()) -> Interval:
    """The mean of `second` minus the mean of `first`, item by item, of scores from 0 to 1.

    Newcombe's method 10 when all scores are 0 or 1, else a bootstrap over items, or over `groups` of them. Raises
    ValueError when the lengths differ or nothing is given.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} scores: a paired difference needs the same items twice")
    if _binary(first) and _binary(second) and _apart(groups):
        pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
        table = [pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))]
        return newcombe(*table)
    return _within(mean([b - a for a, b in zip(first, second, strict=True)], groups), -1.0, 1.0)


def bootstrap(amounts: Sequence[float], weights: Sequence[float]) -> Interval:
    """sum(amounts) / sum(weights), with the percentile interval over resampled items; the seed is fixed.

    With weights of 1 this is a mean; with tokens as weights it is loss a token, resampled by the unit that was packed.
    Of fewer than `FEWEST` items it is marked `too_few`: one item's resamples are all alike, as if it were certain.
    Sources: B. Efron, R. Tibshirani, An introduction to the bootstrap (1993), chapter 13; T. Hesterberg, What teachers
    should know about the bootstrap, The American Statistician 69 (2015), for how much too narrow the percentiles of few
    items are: as much as a normal interval with the variance over n is narrower than Student's.
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
    n, value = len(a), float(a.sum() / w.sum())
    wider = _student(n - 1) / Z * sqrt(n / (n - 1)) if n > 1 else 1.0
    low, high = (value + wider * (float(end) - value) for end in np.quantile(ratios, [0.025, 0.975]))
    return Interval(value, low, high, too_few=n < FEWEST)


def ahead(good: Sequence[float], bad: Sequence[float]) -> Interval:
    """How often a good answer is ahead of a bad one (the area under the ROC curve), from [good answers] the share of
    the bad ones that each is ahead of, and [bad answers] the share of the good ones that are ahead of each; or what one
    model changes about another's, from the differences of their shares.

    Both kinds of answers are a sample, of which the smaller one says how sure it is; it has to be of `FEWEST`. Source:
    E. DeLong, D. DeLong, D. Clarke-Pearson, Comparing the areas under two or more correlated receiver operating
    characteristic curves, Biometrics 44 (1988); its normal quantile is Student's here, with Welch's degrees of freedom.
    """
    parts = [(variance(each) / len(each), len(each) - 1) for each in (good, bad) if len(each) > 1]
    squared = sum(part for part, _ in parts)
    freedom = squared**2 / sum(part**2 / free for part, free in parts) if squared else 1.0
    value, half = fmean(good), _student(freedom) * sqrt(squared)
    return Interval(value, value - half, value + half, too_few=min(len(good), len(bad)) < FEWEST)


def _student(freedom: float) -> float:
    """Student's t at 97.5 %, within 0.3 % from 4 degrees of freedom: M. Abramowitz, I. Stegun, Handbook of mathematical
    functions (1964), 26.7.5."""
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def _within(found: Interval, least: float, most: float) -> Interval:
    return replace(found, low=max(least, found.low), high=min(most, found.high))


def _apart(groups: Sequence[int]) -> bool:
    """Whether every item varies by itself."""
    return len(set(groups)) == len(groups)


def _binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)
