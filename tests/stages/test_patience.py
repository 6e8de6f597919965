"""How a store that cannot be reached is waited for: pauses grow to a bound and are never the same twice, and there is
none where the cause is no outage. A clock stands in for the real one, which would take minutes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from stages.errors import UserError
from stages.objects import network
from stages.objects.network import Place, patiently

PLACE = Place("s3", "bucket", "prefix")


@dataclass
class Clock:
    """Passes only while somebody sleeps."""

    now: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(network, "time", clock)
    return clock


class Away(Exception):
    """An outage."""


class Wrong(Exception):
    """Anything else."""


def ask(operation: Callable[[], str], seconds: float = 90.0) -> str:
    told = {"bad key": UserError("these credentials are refused")}
    return patiently(
        operation, seconds, PLACE, lambda error: isinstance(error, Away), lambda error: told.get(str(error)), "the key"
    )


def away() -> str:
    raise Away


def test_pauses_grow_to_a_bound_and_end_with_the_patience(clock: Clock) -> None:
    with pytest.raises(UserError, match=r"s3://bucket/prefix: cannot be reached \(Away\); check .* the key"):
        ask(away)
    longest = [0.5, 1.0, 2.0, 4.0, 8.0, *([10.0] * 20)]
    assert len(clock.pauses) > 8
    assert all(most / 2 <= pause <= most for pause, most in zip(clock.pauses, longest, strict=False))
    assert 90 - 10 <= clock.now <= 90


def test_those_who_met_one_outage_do_not_come_back_at_once(clock: Clock) -> None:
    pauses = []
    for _ in range(20):
        clock.pauses = []
        with pytest.raises(UserError):
            ask(away, 3.0)
        pauses.append(tuple(clock.pauses))
    assert len(set(pauses)) == 20


def test_an_outage_that_ends_is_forgotten(clock: Clock) -> None:
    answers = iter([away, away, lambda: "here"])
    assert ask(lambda: next(answers)()) == "here"
    assert len(clock.pauses) == 2


@pytest.mark.parametrize(
    ("error", "raised"),
    [(Wrong("unknown"), Wrong), (Wrong("bad key"), UserError), (UserError("no such bucket"), UserError)],
)
def test_what_is_no_outage_is_told_at_once(clock: Clock, error: Exception, raised: type[Exception]) -> None:
    asked = []

    def fail() -> str:
        asked.append(1)
        raise error

    with pytest.raises(raised):
        ask(fail)
    assert (clock.pauses, len(asked)) == ([], 1)
