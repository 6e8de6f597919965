"""Templates, schedules, checkpoints, the cache and filters, where a changed line went unnoticed by all other tests."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

from stages import cache
from stages.cache import Hold
from stages.filters import parse
from stages.traced import TEMPLATE, Traced, runs_of
from stages.train.checkpoints import newest
from stages.train.policy import FEWEST, Watch
from tests.stages.test_cache import BLOB, far, in_cache, made
from tests.stages.test_train_attempts import save, steps_in
from tests.stages.test_train_schedules import shares


def test_inverse_sqrt_without_a_warmup_falls_on_a_time_scale_of_its_own() -> None:
    found = shares(100, schedule="inverse_sqrt", warmup=0)
    assert found == pytest.approx([math.sqrt(10_000 / (10_000 + s)) for s in range(100)])


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_restart_warms_up_below_the_schedule(schedule: str) -> None:
    settings: dict[str, Any] = {"schedule": schedule, "warmup": 3}
    plain = shares(20, **settings)
    found = shares(20, **settings, lora={"restart_every": 5, "restart_warmup": 2})
    assert found == pytest.approx([share / 2 if s in (5, 10, 15) else share for s, share in enumerate(plain)])


def test_a_checkpoint_of_the_very_step_is_gone_back_behind(tmp_path: Path) -> None:
    folder = save(tmp_path, 90, 100)
    assert newest(folder, below=100) == (folder / "90", []) and steps_in(folder) == [90]


def test_as_many_steps_as_a_spike_needs_are_enough() -> None:
    watch = Watch.after({"loss": 1.0, "grad_norm": 1.0} for _ in range(FEWEST))
    assert watch.look({"loss": 1.0, "grad_norm": 100.0}) is not None


def test_an_empty_leaf_keeps_its_place_among_others() -> None:
    text = " X" + Traced("", ((0, 5),)) + Traced("ab ", ((3, 6),))
    assert runs_of(text.strip()) == ((1, TEMPLATE), (0, 5), (2, 6))
    assert runs_of(text[1:]) == ((1, TEMPLATE), (0, 5), (3, 6))


def test_the_only_item_of_a_list_is_its_last_too() -> None:
    row = {"messages": [{"role": "assistant"}]}
    assert parse('messages[-1].role == "assistant"')(row) and parse("has(messages[-1])")(row)
    assert not parse("has(messages[-2])")(row)


def test_room_that_is_made_for_one_download_is_not_given_to_another(tmp_path: Path) -> None:
    store = far(tmp_path, 3 * BLOB)
    for n in range(3):
        made(store, tmp_path / str(n), n)
    assert len(in_cache(store)) == 3
    with Hold(store.cache, 3 * BLOB) as one, Hold(store.cache, 3 * BLOB) as other:
        one.reserve("one", 2 * BLOB)
        assert len(in_cache(store)) == 1 and cache.size_of(store.cache) == 3 * BLOB
        other.reserve("other", BLOB)
        assert in_cache(store) == set() and cache.size_of(store.cache) == 3 * BLOB
    assert cache.size_of(store.cache) == 0


def test_a_copy_that_was_shown_again_outlives_one_that_was_not(tmp_path: Path) -> None:
    store = far(tmp_path, 3 * BLOB)
    trees = [made(store, tmp_path / str(n), n) for n in range(3)]
    for path in (store.cache / "blobs").rglob("*"):
        os.utime(path, ns=(1, 1))
    for n in (0, 1, 2, 0):
        with store.hold() as hold:
            store.view(trees[n], hold)
        cache.drop_views(store.cache, float("inf"))
    made(store, tmp_path / "3", 3)
    assert {tree.files[0].sha256 for tree in (trees[0], trees[2])} < in_cache(store)


def test_objects_are_equal_when_they_have_the_same_fields() -> None:
    rows = [{"a": {"x": 1}, "b": {"x": 1, "y": 2}}, {"a": {"x": 1, "y": 2}, "b": {"x": 1}}]
    assert [parse("a == b")(row) for row in rows] == [False, False]


def test_the_view_that_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    store = far(tmp_path, 3 * BLOB)
    trees = [made(store, tmp_path / str(n), n) for n in range(4)]
    for at, n in enumerate((0, 1, 2, 0, 3)):
        with store.hold() as hold:
            os.utime(store.view(trees[n], hold), ns=(at, at))
    left = {n for n, tree in enumerate(trees) if (store.cache / "views" / tree.digest).exists()}
    assert left == {0, 2, 3} and cache.size_of(store.cache) <= 3 * BLOB


def test_what_stands_in_for_a_part_counts_as_that_part() -> None:
    text = "Xb" + Traced("ab", ((2, 0),)) + Traced("b1", ((2, 1),))
    found = text.replace("b", "YY")
    assert found == "XYYaYYYY1"
    assert [run for run in runs_of(found) if run[0]] == [(3, TEMPLATE), (3, 0), (3, 1)]
