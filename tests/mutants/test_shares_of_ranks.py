"""Which sequences a rank computes in which step, and by which seeds, where a changed line went unnoticed by all other
tests."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from packing.collate import PackedBins
from stages.objectives import find
from stages.train.data import Step, Steps, step_order
from stages.train.prompts import order as order_of_prompts
from tests.stages import tiny


@pytest.fixture
def bins(tmp_path: Path) -> PackedBins:
    """Three steps of seven sequences, and one of two; no document is like another."""
    rows = [[3 + (11 * n + i) % 60 for i in range(5 + n % 3)] for n in range(23)]
    made = tiny.plan(tmp_path, rows, global_batch=7, packed=False)
    return PackedBins(made["tokens"], made["plan"])


def steps(bins: PackedBins, **given: Any) -> Steps:
    return Steps(bins, given.pop("order", range(bins.steps)), given.pop("micro_batch", 2), find("sft"), **given)


def sequences(step: Step, counts: bool = True) -> list[tuple[int, ...]]:
    """The ids of the documents in a step's passes, without padding."""
    found: list[tuple[int, ...]] = []
    for each in step["batches"]:
        if each["counts"] == counts:
            ends = each["batch"]["cu_seq_lens_q"].tolist()
            ids = each["batch"]["input_ids"][0].tolist()
            found += [tuple(ids[a:b]) for a, b in pairwise(ends) if any(ids[a:b])]
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_ranks_of_a_step_compute_each_of_its_sequences_once(bins: PackedBins, ranks: int) -> None:
    """Or some data would be learned twice and some never. In the last step most of five ranks have none."""
    order = [2, 3, 0, 1]
    hands = [steps(bins, order=order, rank=rank, ranks=ranks) for rank in range(ranks)]
    for number, step in enumerate(order):
        shares = [hand[number] for hand in hands]
        wanted = [tuple(bins[b].ids.tolist()) for b in bins.step(step)]
        assert sorted(s for share in shares for s in sequences(share)) == sorted(wanted)
        assert len({len(share["batches"]) for share in shares}) == 1, "they wait for one another in every pass"
        assert {share["count"] for share in shares} == {int(bins.trained[bins.step(step)].sum())}


def test_a_pass_that_only_keeps_a_rank_in_step_counts_nothing(bins: PackedBins) -> None:
    idle = steps(bins, micro_batch=1, rank=2, ranks=3)[3]
    assert [each["counts"] for each in idle["batches"]] == [False] and sequences(idle, counts=False)
    short = steps(bins, micro_batch=1, rank=1, ranks=3)[0]
    assert [each["counts"] for each in short["batches"]] == [True, True, False]


def test_what_a_pass_draws_hangs_on_the_seed_the_step_and_its_sequences(bins: PackedBins) -> None:
    """Dropout would be the same everywhere, or another seed would give the same training."""

    def seeds(**given: Any) -> list[int]:
        found = steps(bins, order=[0, 0], **given)
        return [each["seed"] for number in range(2) for each in found[number]["batches"]]

    one = seeds(seed=1)
    assert one == seeds(seed=1) and len(set(one)) == len(one) == 8
    assert not {*one} & {*seeds(seed=2)}


def test_the_seed_and_the_epoch_draw_the_order_of_steps_and_of_prompts() -> None:
    for draw in (
        lambda seed: step_order([0, 20, 40], 2, 60, seed),
        lambda seed: order_of_prompts(20, 60, seed),
    ):
        first, second, third = (draw(1)[begin : begin + 20] for begin in (0, 20, 40))
        assert draw(1) == draw(1) and first == list(range(20))
        assert second != first and third not in (first, second)
        assert draw(2)[20:40] != second and draw(2)[40:] != third


def test_every_prompt_is_asked_once_in_every_epoch_and_those_of_a_short_one_are_its_first() -> None:
    asked = order_of_prompts(7, 20, seed=3)
    assert [sorted(asked[a : a + 7]) for a in (0, 7)] == [list(range(7))] * 2
    assert len({*asked[14:]}) == len(asked[14:]) == 6 and asked == order_of_prompts(7, 21, seed=3)[:20]
