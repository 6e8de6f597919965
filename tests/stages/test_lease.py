"""Leases: one holder at a time, taken over from the dead, known to be lost by whoever lost it."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from stages.lease import lease
from stages.objects import Objects
from stages.store import Store, open_store

DRIVER = str(Path(__file__).with_name("store_driver.py"))
KEY = "0" * 64
PATH = f"locks/train/{KEY}.json"


def document(store: Store) -> dict[str, Any]:
    found = store.objects.read(PATH)
    assert found is not None
    return dict(json.loads(found.data))


def foreign(store: Store, **fields: object) -> None:
    """A lease held by a process of another machine, which we cannot look at."""
    held = {"owner": "a far host", "seconds": 1.0, "token": "theirs", "renewals": 0, "released": False}
    store.objects.put(PATH, json.dumps({**held, "process": ["other", "pid:[1]", "1", "1"], **fields}).encode())


def test_a_second_holder_waits_for_the_first(any_store: Store) -> None:
    told, order = [], []
    waiting = threading.Event()

    def second() -> None:
        def on_wait(line: str) -> None:
            told.append(line)
            waiting.set()

        with lease(any_store, "train", KEY, 1.0, "second", on_wait):
            order.append("second")

    with lease(any_store, "train", KEY, 1.0, "first", told.append) as held:
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        # Twice the lease's life: only its renewals keep it from being taken over.
        assert not held.lost.wait(2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert len(told) == 1 and "first" in told[0] and "train" in told[0]
    assert document(any_store)["released"]


def test_other_actions_do_not_wait(store: Store) -> None:
    others = lease(store, "train", "1" * 64, 60.0, "two"), lease(store, "merge", KEY, 60.0, "three")
    with lease(store, "train", KEY, 60.0, "one"), others[0] as second, others[1] as third:
        assert not second.lost.is_set() and not third.lost.is_set()


@pytest.mark.failure(
    what="the holder of a lease is killed on this machine",
    outcome="the next one takes the lease over at once",
)
@pytest.mark.parametrize("shared_url", ["folder", "s3"], indirect=True)
def test_a_holder_killed_on_this_machine_is_followed_at_once(shared_url: str, tmp_path: Path) -> None:
    store = open_store(shared_url, tmp_path / "cache")
    command = [sys.executable, DRIVER, "hold", shared_url, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == "ready\n"
            assert document(store)["owner"] == "the holder" and document(store)["seconds"] == 300
        finally:
            holder.kill()
    started = time.monotonic()
    with lease(store, "train", KEY, 60.0, "me") as held:
        assert not held.lost.is_set()
    assert time.monotonic() - started < 10


@pytest.mark.failure(
    what="a machine that holds a lease vanishes",
    outcome="the lease is taken over once its life is over, and not before",
)
def test_a_holder_that_fell_silent_elsewhere_is_followed_after_its_time(store: Store) -> None:
    foreign(store, seconds=1.0)
    told: list[str] = []
    started = time.monotonic()
    with lease(store, "train", KEY, 60.0, "me", told.append):
        assert 1.0 <= time.monotonic() - started < 5.0
        assert document(store)["owner"] == "me"
    assert told == [f"waiting for a far host, who is at work on train/{KEY}"]


@pytest.mark.failure(
    what="a machine's clock is wrong by years",
    outcome="nothing: leases are judged by each waiter's own monotonic clock",
)
def test_a_clock_that_is_wrong_by_years_changes_nothing(store: Store) -> None:
    foreign(store, seconds=1.0)
    wrong = time.mktime((2090, 1, 1, 0, 0, 0, 0, 0, 0))
    os.utime(Path(store.url) / PATH, (wrong, wrong))
    started = time.monotonic()
    with lease(store, "train", KEY, 60.0, "me"):
        assert 1.0 <= time.monotonic() - started < 5.0


def test_a_holder_that_renews_is_not_followed(store: Store) -> None:
    """Judged by change alone: a renewal seen within its time starts the time anew."""
    foreign(store, seconds=1.0)
    acquired = threading.Event()

    def wait() -> None:
        with lease(store, "train", KEY, 60.0, "me", lambda line: None):
            acquired.set()

    thread = threading.Thread(target=wait)
    thread.start()
    for renewals in range(1, 5):
        assert not acquired.wait(0.4)
        foreign(store, seconds=1.0, renewals=renewals)
    assert acquired.wait(5)
    thread.join(5)


def test_a_lease_that_was_taken_over_is_known_to_be_lost(any_store: Store) -> None:
    with lease(any_store, "train", KEY, 1.0, "me") as held:
        assert not held.lost.is_set()
        foreign(any_store)
        assert held.lost.wait(3)
        assert held.why == "another run took it over"
    assert document(any_store)["owner"] == "a far host" and not document(any_store)["released"]


def test_a_lease_that_was_swept_is_taken_again(store: Store) -> None:
    with lease(store, "train", KEY, 1.0, "me") as held:
        store.objects.delete(PATH)
        assert not held.lost.wait(1.5)
        assert document(store)["owner"] == "me"


@dataclass
class Cut:
    """Objects that can be cut off from their network: calls fail, or are heard and their answer is lost."""

    objects: Objects
    fails: Callable[[str], bool] = field(default=lambda name: False)
    loses_answers: bool = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.objects, name)

        def call(*arguments: Any) -> Any:
            if self.fails(name):
                raise ConnectionError("cut off")
            result = found(*arguments)
            if self.loses_answers and name == "swap":
                raise ConnectionError("the answer is lost")
            return result

        return call if callable(found) else found


@pytest.mark.failure(
    what="the holder of a lease is cut off from the store",
    outcome="it stops by itself before anybody may take over",
)
def test_a_holder_cut_off_for_the_leases_life_stops(store: Store) -> None:
    cut = Cut(store.objects)
    with lease(replace(store, objects=cut), "train", KEY, 1.5, "me") as held:  # type: ignore[arg-type]
        assert not held.lost.wait(1.6)
        started = time.monotonic()
        cut.fails = lambda name: True
        assert held.lost.wait(5)
        assert time.monotonic() - started <= 1.6  # before anybody may take over
        cut.fails = lambda name: False
        assert held.lost.is_set()
        assert held.why == "it could not be renewed for 1.5 s: cut off"


def test_a_renewal_whose_answer_was_lost_loses_no_lease(store: Store) -> None:
    cut = Cut(store.objects)
    with lease(replace(store, objects=cut), "train", KEY, 1.5, "me") as held:  # type: ignore[arg-type]
        cut.loses_answers = True
        assert not held.lost.wait(0.9)
        cut.loses_answers = False
        assert not held.lost.wait(1.5)
    assert document(store)["released"] and document(store)["renewals"] > 2


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"7", b'{"owner": "x"}'])
def test_a_lease_that_cannot_be_read_protects_nobody(store: Store, data: bytes) -> None:
    store.objects.put(PATH, data)
    with lease(store, "train", KEY, 60.0, "me") as held:
        assert not held.lost.is_set()
