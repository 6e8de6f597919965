"""The plan against the greedy rule written out, and its promises on random input."""

import subprocess
import sys
from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from packing.plan import Plan, deal, pack

LENGTHS = st.lists(st.integers(1, 40), max_size=120)


def greedy(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing, one document at a time: the space left in each bin, sorted."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fit = bisect_left(spaces, length)
        insort(spaces, (spaces.pop(fit) if fit < len(spaces) else capacity) - length)
    return spaces


def spaces(plan: Plan, lengths: list[int], capacity: int) -> list[int]:
    array = np.array(lengths)
    return sorted(capacity - int(array[each].sum()) for each in bins(plan))


def bins(plan: Plan) -> list[NDArray[np.uint32]]:
    return np.split(plan.documents, plan.offsets[1:-1]) if len(plan) else []


def costs(plan: Plan, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.array([(lengths[each] ** 2).sum() for each in bins(plan)])


def lognormal(count: int, capacity: int, mean: float = 721) -> NDArray[np.int64]:
    random = np.random.default_rng(0)
    return np.clip(random.lognormal(np.log(mean) - 0.5, 1.0, count), 1, capacity).astype(np.int64)


@settings(max_examples=300, deadline=None)
@given(
    lengths=LENGTHS,
    capacity=st.integers(40, 90),
    batch=st.integers(1, 7),
    cap=st.none() | st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_every_document_once_in_bins_that_hold_it(
    lengths: list[int], capacity: int, batch: int, cap: int | None, seed: int
) -> None:
    plan = pack(np.array(lengths, np.int64), capacity, global_batch=batch, seed=seed, max_documents=cap)
    assert sorted(plan.documents.tolist()) == list(range(len(lengths)))
    assert all(0 <= space < capacity for space in spaces(plan, lengths, capacity)), "an overfull or an empty bin"
    assert all(len(each) <= (cap or len(lengths)) for each in bins(plan))
    again = pack(np.array(lengths, np.int64), capacity, global_batch=batch, seed=seed, max_documents=cap)
    assert again.documents.tobytes() == plan.documents.tobytes()
    assert again.offsets.tobytes() == plan.offsets.tobytes()


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, capacity=st.integers(40, 200), seed=st.integers(0, 3), data=st.data())
def test_the_bins_are_those_of_the_greedy_rule_in_any_order(
    lengths: list[int], capacity: int, seed: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(lengths))
    for order in (lengths, shuffled):
        plan = pack(np.array(order, np.int64), capacity, global_batch=4, seed=seed)
        assert spaces(plan, order, capacity) == greedy(order, capacity)


def test_the_bins_are_those_of_the_greedy_rule_at_scale() -> None:
    lengths = lognormal(20_000, 4096)
    plan = pack(lengths, 4096, global_batch=16, seed=1)
    assert spaces(plan, lengths.tolist(), 4096) == greedy(lengths.tolist(), 4096)


def test_a_cap_is_honoured_where_it_binds() -> None:
    lengths = np.full(1000, 10)
    plan = pack(lengths, 1000, global_batch=1, seed=0, max_documents=7)
    assert np.diff(plan.offsets).max() == 7
    assert len(plan) == -(-1000 // 7)


def test_seeds_shuffle_documents_and_bins_but_not_the_fill() -> None:
    lengths = lognormal(2000, 2048)
    one, two = (pack(lengths, 2048, global_batch=8, seed=seed) for seed in (1, 2))
    assert len(one) == len(two)
    assert {tuple(sorted(each.tolist())) for each in bins(one)} != {tuple(sorted(each.tolist())) for each in bins(two)}


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=150), batch=st.integers(1, 9), seed=st.integers(0, 3))
def test_steps_differ_by_no_more_than_the_costliest_and_the_cheapest_bin(
    lengths: list[int], batch: int, seed: int
) -> None:
    array = np.array(lengths)
    cost = costs(pack(array, 60, global_batch=batch, seed=seed), array)
    full = cost[: len(cost) // batch * batch].reshape(-1, batch)
    if len(full):
        totals = full.sum(axis=1)
        assert totals.max() - totals.min() <= full.max() - full.min()
        assert (np.diff(full, axis=1) <= 0).all(), "bins of a step go from costly to cheap"


def test_steps_mix_long_and_short_documents() -> None:
    """Without it the first steps would hold only long documents: best-fit decreasing opens bins in that order."""
    lengths = lognormal(20_000, 4096)
    plan = pack(lengths, 4096, global_batch=32, seed=0)
    cost = costs(plan, lengths)[: len(plan) // 32 * 32].reshape(-1, 32)
    assert cost.sum(axis=1).std() < 0.02 * cost.sum(axis=1).mean()
    assert cost.sum(axis=1).std() < 0.1 * cost.std() * 32**0.5, "no better than plain shuffling"


@settings(max_examples=200, deadline=None)
@given(cost=st.lists(st.integers(0, 1000), max_size=60), ranks=st.integers(1, 9))
def test_dealing_gives_every_bin_to_one_rank_and_balances_them(cost: list[int], ranks: int) -> None:
    cost.sort(reverse=True)
    hands = deal(len(cost), ranks)
    assert sorted(number for hand in hands for number in hand) == list(range(len(cost)))
    assert {len(hand) for hand in hands} <= {len(cost) // ranks, -(-len(cost) // ranks)}
    for size in {len(hand) for hand in hands}:
        totals = [sum(cost[number] for number in hand) for hand in hands if len(hand) == size]
        assert max(totals) - min(totals) <= max(cost, default=0) - min(cost, default=0)


@settings(max_examples=200, deadline=None)
@given(
    told=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=150),
    batch=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_windows_are_packed_by_themselves_and_stand_one_after_another(
    told: list[tuple[int, int]], batch: int, seed: int
) -> None:
    lengths, windows = np.array(told, np.int64).reshape(-1, 2).T
    plan = pack(lengths, 60, global_batch=batch, seed=seed, windows=windows)
    assert sorted(plan.documents.tolist()) == list(range(len(told)))
    assert plan.windows[0] == 0 and plan.windows[-1] == len(plan)
    made, cost = bins(plan), costs(plan, lengths)
    for window, (begin, end) in enumerate(zip(plan.windows, plan.windows[1:], strict=False)):
        assert all((windows[each] == window).all() for each in made[begin:end])
        own = lengths[windows == window].tolist()
        assert sorted(60 - int(lengths[each].sum()) for each in made[begin:end]) == greedy(own, 60)
        steps = cost[-(-begin // batch) * batch : end // batch * batch].reshape(-1, batch)
        if len(steps):
            assert np.ptp(steps.sum(axis=1)) <= np.ptp(cost[begin:end])
            assert (np.diff(steps, axis=1) <= 0).all(), "bins of a step go from costly to cheap"


def test_one_window_is_no_window() -> None:
    lengths = lognormal(500, 2048)
    one, none = (pack(lengths, 2048, global_batch=8, seed=3, windows=each) for each in (np.zeros(500, np.int64), None))
    assert one.documents.tobytes() == none.documents.tobytes()
    assert one.offsets.tobytes() == none.offsets.tobytes()
    assert one.windows.tolist() == none.windows.tolist() == [0, len(one)]


def test_what_a_rank_gains_in_one_round_it_gives_back_in_the_next() -> None:
    assert deal(8, 3) == [[0, 5, 6], [1, 4, 7], [2, 3]]
    cost = [40 - number for number in range(32)]
    for ranks in (2, 4, 8, 16):
        assert len({sum(cost[number] for number in hand) for hand in deal(32, ranks)}) == 1


@pytest.mark.parametrize(("lengths", "told"), [([3, 0], "document 1 has 0 tokens"), ([65, 3], "document 0 has 65")])
def test_a_length_out_of_range_is_named(lengths: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pack(np.array(lengths), 64, global_batch=1, seed=0)


def test_a_plan_is_the_same_on_every_machine() -> None:
    """Only NumPy's raw bit stream, which it promises not to change, decides; so the numbers can stand here."""
    plan = pack(np.array([6, 6, 6, 4, 4, 4, 4]), 10, global_batch=2, seed=7)
    assert [each.tolist() for each in bins(plan)] == [[2, 6], [3], [0, 5], [1, 4]]


COLD = """
import time; begin = time.perf_counter()
import numpy as np, re
from packing.plan import pack
random = np.random.default_rng(0)
lengths = np.clip(random.lognormal(6.08, 1.0, {count}), 1, {capacity}).astype(np.int32)
pack(lengths, {capacity}, global_batch=64, seed=0)
# Not ru_maxrss, which begins with the peak of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(time.perf_counter() - begin, peak / 1024)
"""


@pytest.mark.full
@pytest.mark.parametrize(("count", "capacity", "seconds"), [(100_000, 4096, 1.0), (1_000_000, 8192, 1.5)])
def test_a_cold_process_plans_fast(count: int, capacity: int, seconds: float) -> None:
    """The best of three: other work on the machine may slow a run, nothing makes one too fast."""
    program = COLD.format(count=count, capacity=capacity)
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(3)]
    wall, megabytes = zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
    assert min(wall) < seconds
    assert max(megabytes) < 500
