"""Which shards a training asks for, where a changed line went unnoticed by all other quick tests."""

from collections.abc import Sequence
from typing import Any

import pytest

from stages.train.windows import Windows

Asked = list[tuple[set[str], set[str]]]


class Bins:
    """Eleven sequences in three windows of two shards each."""

    global_batch = 2

    def __init__(self, windows: Sequence[int]) -> None:
        self.windows = windows
        self.paths = ["a0", "a1", "b0", "b1", "c0", "c1", "unread"]
        self.window_of_shard = [0, 0, 1, 1, 2, 2, None]

    def __len__(self) -> int:
        return self.windows[-1]

    def __getitem__(self, number: int) -> int:
        return number

    def shards_of(self, numbers: Sequence[int]) -> set[int]:
        return {2 * next(w for w in range(3) if number < self.windows[w + 1]) for number in numbers}

    def close(self) -> None:
        pass


def asked(windows: Sequence[int]) -> tuple[Windows, Asked]:
    """What was asked for now and next, call by call."""
    seen: Asked = []
    bins: Any = Bins(windows)
    return Windows(bins, lambda name, now, then: seen.append((now, then))), seen


A, B, C = {"a0", "a1"}, {"b0", "b1"}, {"c0", "c1"}


@pytest.mark.parametrize(
    ("windows", "shown"),
    [
        ([0, 4, 8, 11], [(A, B), (B, C), (C, set())]),
        ([0, 3, 8, 11], [(A, B), (A | B, set()), (B, C), (C, set())]),
    ],
    ids=["steps end with windows", "a step reads two"],
)
def test_a_step_has_its_windows_and_the_next_one_is_on_its_way(windows: list[int], shown: Asked) -> None:
    """One too few is a step without its data; one too many is more than the disk may hold."""
    found, seen = asked(windows)
    assert found.begin(range(6), 0) == 0
    assert seen.pop(0) == ({"a0"}, set()), "the one that is tried out"
    for position in range(6):
        found.reach(position)
    assert seen == shown


def test_a_training_that_goes_on_has_the_window_of_the_step_it_goes_on_with() -> None:
    found, seen = asked([0, 4, 8, 11])
    found.begin([1, 0, 3, 2, 5, 4], 4)
    assert seen[1:] == [(C, set())]
    found.read([0])
    found.reach(4)
    assert seen[2:] == [({"a0"}, set()), (C, set())], "what was read in between took it away"
