"""Intervals that decide about promotion, where a changed line went unnoticed by all other tests."""

import random
from math import sqrt
from statistics import NormalDist, fmean, stdev

import pytest

from stages.intervals import bootstrap, mean, paired_difference


def test_yes_and_no_against_shares_is_no_table_of_yes_and_no() -> None:
    """Half a point would count as a whole one."""
    binary, shares = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.25, 0.5, 0.75, 0.5]
    for first, second in ((binary, shares), (shares, binary)):
        assert paired_difference(first, second) == mean([b - a for a, b in zip(first, second, strict=True)])


def test_the_interval_of_a_ratio_is_that_of_sums_by_sums() -> None:
    """A short sequence would weigh as much as a long one."""
    found = bootstrap([100.0, 1.0, 1.0, 1.0, 1.0], [100.0, 0.5, 0.5, 0.5, 0.5])
    assert found.value == pytest.approx(104 / 102)
    assert 0.98 < found.low < found.value < found.high


def test_an_interval_over_many_items_is_of_all_its_resamples() -> None:
    """They are drawn in blocks, the last of which is shorter."""
    generator = random.Random(0)
    scores = [generator.gauss(3.0, 2.0) for _ in range(900)]
    found, half = mean(scores), NormalDist().inv_cdf(0.975) * stdev(scores) / sqrt(900)
    assert found.low == pytest.approx(fmean(scores) - half, abs=half / 10)
    assert found.high == pytest.approx(fmean(scores) + half, abs=half / 10)
