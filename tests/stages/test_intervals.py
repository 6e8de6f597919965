"""Intervals against published values, slow oracles and their own promises."""

import random
from math import sqrt
from statistics import NormalDist, fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.intervals import Interval, Z, ahead, bootstrap, mean, newcombe, paired_difference, share, wilson

COUNTS = st.tuples(st.integers(1, 400), st.floats(0, 1)).map(lambda t: (round(t[0] * t[1]), t[0]))
TABLE = st.tuples(*[st.integers(0, 60)] * 4).filter(any)


def test_wilson_gives_the_published_value() -> None:
    # 81 of 263: the example of Newcombe's comparison of seven methods, Statistics in Medicine 17 (1998), 857-872.
    found = wilson(81, 263)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


@settings(deadline=None)
@given(COUNTS)
def test_wilsons_limits_are_where_the_score_test_just_rejects(counts: tuple[int, int]) -> None:
    successes, n = counts
    found = wilson(successes, n)

    def rejects(p: float) -> bool:
        return abs(successes / n - p) > Z * sqrt(p * (1 - p) / n)

    assert 0 <= found.low <= found.value <= found.high <= 1
    margin = 1e-6
    if found.low > margin:
        assert rejects(found.low - margin) and not rejects(found.low + margin)
    if found.high < 1 - margin:
        assert rejects(found.high + margin) and not rejects(found.high - margin)


def test_newcombe_gives_the_published_value() -> None:
    # Airway hyper-responsiveness before and after a transplantation (1, 1, 7, 12), as tabled by Fagerland, Lydersen
    # and Laake, Statistics in Medicine 33 (2014), 2850-2875: 0.286 with limits 0.026 and 0.507.
    found = newcombe(1, 1, 7, 12)
    assert found.value == pytest.approx(0.2857, abs=5e-5)
    assert (found.low, found.high) == (pytest.approx(0.026, abs=5e-4), pytest.approx(0.507, abs=5e-4))


def test_newcombe_by_hand_with_a_clear_correlation() -> None:
    # 45 and 55 of 100; phi = (40 * 40 - 5 * 15 - 100 / 2) / sqrt(45 * 55 * 55 * 45) = 1475 / 2475.
    first, second, phi = wilson(45, 100), wilson(55, 100), 1475 / 2475
    down, up = second.value - second.low, first.high - first.value
    found = newcombe(40, 5, 15, 40)
    assert found.low == pytest.approx(0.1 - sqrt(down**2 - 2 * phi * down * up + up**2))
    assert 0 < found.low < 0.1 < found.high < 0.19


@settings(deadline=None)
@given(TABLE)
def test_newcombe_is_antisymmetric_and_bounded(table: tuple[int, int, int, int]) -> None:
    both, first, second, neither = table
    found, mirrored = newcombe(both, first, second, neither), newcombe(both, second, first, neither)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert (found.low, found.high) == (pytest.approx(-mirrored.high), pytest.approx(-mirrored.low))
    assert found.value == pytest.approx((second - first) / sum(table))


@pytest.mark.parametrize(("both", "first", "second"), [(0.5, 0.05, 0.15), (0.0, 0.04, 0.6), (0.3, 0.2, 0.2)])
def test_newcombe_covers_the_truth_about_95_times_in_100(both: float, first: float, second: float) -> None:
    generator = random.Random(0)
    rounds, n, covered = 1500, 80, 0
    for _ in range(rounds):
        cells = generator.choices(range(4), [both, first, second, 1 - both - first - second], k=n)
        found = newcombe(*(cells.count(i) for i in range(4)))
        covered += found.low <= second - first <= found.high
    assert 0.93 <= covered / rounds <= 0.99


def test_a_clear_gain_excludes_zero_and_a_draw_does_not() -> None:
    assert newcombe(4, 1, 40, 55).low > 0
    assert newcombe(4, 6, 7, 83).low < 0 < newcombe(4, 6, 7, 83).high
    nothing = newcombe(10, 0, 0, 90)
    assert nothing.low <= 0 <= nothing.high


def test_paired_difference_counts_the_pairs() -> None:
    first, second = [1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0]
    assert paired_difference(first, second) == newcombe(1, 1, 2, 2)


def test_scores_between_0_and_1_get_a_bootstrap_near_the_normal_interval() -> None:
    generator = random.Random(1)
    scores = [generator.random() for _ in range(400)]
    mean = sum(scores) / 400
    error = sqrt(sum((s - mean) ** 2 for s in scores) / 399 / 400)
    found = share(scores)
    half = NormalDist().inv_cdf(0.975) * error
    assert found.value == pytest.approx(mean)
    assert (found.low, found.high) == (
        pytest.approx(mean - half, abs=half / 8),
        pytest.approx(mean + half, abs=half / 8),
    )


def test_pairing_narrows_the_interval() -> None:
    generator = random.Random(2)
    first = [generator.random() for _ in range(200)]
    second = [s + 0.01 + 0.01 * generator.random() for s in first]
    paired = paired_difference(first, second)
    assert 0.01 < paired.low < paired.high < 0.02
    assert share(first).high > share(second).low


def test_a_ratio_is_weighted() -> None:
    found = bootstrap([10.0, 2.0], [10.0, 1.0])
    assert found.value == 12 / 11
    assert found.low < 1.0 < 2.0 < found.high
    assert found.too_few and found.document["too_few"] is True


@pytest.mark.parametrize("items", [1, 4, 5])
def test_a_bootstrap_of_fewer_than_five_items_says_so(items: int) -> None:
    assert paired_difference([0.5] * items, [0.6] * items).too_few is (items < 5)
    assert not paired_difference([0.0] * items, [1.0] * items).too_few, "shares have closed forms"


@pytest.mark.parametrize("items", [5, 6, 10, 30])
def test_equal_models_are_told_apart_about_5_times_in_100_however_few_items_there_are(
    items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.intervals.RESAMPLES", 1000)
    generator, rounds = random.Random(items), 500
    found = [mean([generator.gauss(0.0, 1.0) for _ in range(items)]) for _ in range(rounds)]
    assert 0.02 <= sum(not each.low <= 0 <= each.high for each in found) / rounds <= 0.085


@pytest.mark.parametrize(("solutions", "steps"), [(8, 12), (30, 6)])
def test_steps_of_one_solution_are_no_items_of_their_own(
    solutions: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models, each good or bad at a whole solution, and as good as the other on the whole."""
    monkeypatch.setattr("stages.intervals.RESAMPLES", 1000)
    generator, rounds = random.Random(steps), 400

    def told(likely: list[float]) -> list[float]:
        return [float(generator.random() < each) for each in likely for _ in range(steps)]

    groups = [solution for solution in range(solutions) for _ in range(steps)]
    clear = blind = 0
    for _ in range(rounds):
        first, second = (told([generator.betavariate(1, 0.6) for _ in range(solutions)]) for _ in range(2))
        found, wrong = paired_difference(first, second, groups), paired_difference(first, second)
        assert found.value == pytest.approx(wrong.value)
        clear += not found.low <= 0 <= found.high
        blind += not wrong.low <= 0 <= wrong.high
    assert 0.02 <= clear / rounds <= 0.085 < blind / rounds


def test_groups_of_one_are_items() -> None:
    first, second = [1.0, 1, 0, 0, 0, 0], [1.0, 0, 1, 1, 0, 0]
    assert paired_difference(first, second, range(6)) == newcombe(1, 1, 2, 2)
    assert share(first, [0, 1, 1, 2, 3, 3]).too_few and not share(first, range(6)).too_few


def shares(good: list[float], bad: list[float]) -> tuple[list[float], list[float]]:
    """Of each good answer, how many bad ones it is ahead of; of each bad one, how many good ones are ahead of it."""

    def behind(one: float, other: float) -> float:
        return (one > other) + (one == other) / 2

    ahead_of = [fmean(behind(one, other) for other in bad) for one in good]
    return ahead_of, [fmean(behind(one, other) for one in good) for other in bad]


@pytest.mark.parametrize(("good", "bad"), [(100, 5), (60, 15), (5, 60), (30, 30)])
def test_good_and_bad_answers_are_both_a_sample(good: int, bad: int) -> None:
    """Equally good models, also where few answers of one kind stand against many of the other."""
    generator, rounds = random.Random(good), 400

    def judged(worth: list[float]) -> list[float]:
        return [each + generator.gauss(0, 1) for each in worth]

    clear = blind = 0
    for _ in range(rounds):
        better = [generator.gauss(0.5, 1) for _ in range(good)]
        worse = [generator.gauss(0, 1) for _ in range(bad)]
        first, second = (shares(judged(better), judged(worse)) for _ in range(2))
        changes = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]
        found = ahead(*changes)
        clear += not found.low <= 0 <= found.high
        error = stdev(changes[0]) / sqrt(good)
        blind += abs(found.value) > Z * error
        assert ahead(*first).value == pytest.approx(fmean(first[1])), "seen from either side it is the same area"
    assert 0.02 <= clear / rounds <= 0.085
    assert good < bad or blind / rounds > 0.085, "the good ones alone do not tell"


def test_the_smaller_kind_of_answers_says_whether_they_are_too_few() -> None:
    assert ahead([0.5] * 200, [0.5] * 4).too_few and ahead([0.5] * 4, [0.5] * 200).too_few
    assert ahead([1.0] * 3, [1.0]).too_few
    assert not ahead([0.5] * 5, [0.5] * 5).too_few


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=1, max_size=30))
def test_the_same_scores_give_the_same_interval(scores: list[float]) -> None:
    assert share(scores) == share(scores)
    assert share(scores).low <= share(scores).value + 1e-12


@pytest.mark.parametrize("call", [lambda: wilson(3, 2), lambda: wilson(0, 0), lambda: paired_difference([], [])])
def test_counts_that_cannot_be_are_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError):
        call()


def test_documents_hold_plain_numbers() -> None:
    assert Interval(0.5, 0.25, 0.75).document == {"value": 0.5, "low": 0.25, "high": 0.75}
