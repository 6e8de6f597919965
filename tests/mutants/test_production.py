"""How production moves and goes back, where a changed line went unnoticed by all other tests."""

import json
import shutil
from pathlib import Path

import pytest

from flows.promotion import promote as by_person
from flows.run import start
from flows.settle import settle
from stages.errors import UserError
from stages.production import KEPT, production, rollback
from stages.store import Store
from tests.flows.rehearsal import Rehearsal
from tests.stages.test_production import memory, named, put, stands


def replace(store: Store, model: int, by: int) -> None:
    """Promote a model that was compared with the one that stands."""
    assert put(store, by, production(store, "bot"), compared=named(model))


def test_what_was_gone_back_to_and_replaced_again_is_gone_back_behind(tmp_path: Path) -> None:
    """A rollback to a rollback: before it stood what stood before the model that it had put back."""
    store = memory(tmp_path)
    for model in "ab":
        put(store, model, production(store, "bot"))
    rollback(store, "bot")
    put(store, "c", production(store, "bot"))
    rollback(store, "bot")
    assert stands(store) == "a"
    with pytest.raises(UserError, match="no model stood in production before"):
        rollback(store, "bot")


def test_a_model_that_is_gone_back_to_keeps_being_compared_with_what_it_had_replaced(tmp_path: Path) -> None:
    """Or looking again would score it anew, and against nothing."""
    store = memory(tmp_path)
    put(store, 1, None)
    for model in (1, 2):
        replace(store, model, by=model + 1)
    assert rollback(store, "bot").compared == named(1)
    found = production(store, "bot")
    assert found and found.now.model == named(2) and found.rival(named(2)["digest"]) == named(1)


def test_an_old_move_lets_go_of_its_run_and_of_what_it_was_compared_with(tmp_path: Path) -> None:
    """gc keeps all that a run used which a ref names, and whatever else stands there in full."""
    store = memory(tmp_path)
    put(store, 1, None)
    for model in range(1, KEPT + 3):
        replace(store, model, by=model + 1)
    ref, found = store.read_ref("bot/production"), production(store, "bot")
    assert ref and found and len(found.moves) == KEPT + 3
    assert [move.run for move in found.moves] == [""] * 3 + [f"run-{n}" for n in range(4, KEPT + 4)]
    text = json.dumps(ref.document)
    assert named(3)["digest"] in text, "the oldest of those that stay was compared with it"
    assert named(2)["digest"] not in text and named(1)["digest"] not in text


def test_a_run_that_goes_on_forgets_no_move_of_others(tmp_path: Path) -> None:
    """Its record knows the last move alone, and a rollback would find nothing before that."""
    rehearsal = Rehearsal(tmp_path)
    first, _ = rehearsal.run(10)
    second, _ = rehearsal.run(20)
    begun = rehearsal.start(30)
    begun.record("started")
    resumed = rehearsal.make(start(begun.loaded, begun.runtime, begun.store, begun.store.read_run(begun.id)))
    assert settle(resumed).production == "moved"
    found = production(rehearsal.store, "bot")
    assert found and [move.run for move in found.moves] == [first.id, second.id, begun.id]
    assert [rollback(rehearsal.store, "bot").run for _ in range(2)] == [second.id, first.id]


def test_a_model_that_is_promoted_by_a_later_run_keeps_what_it_was_compared_with(tmp_path: Path) -> None:
    """That run found it in production, and it is not compared with itself."""
    rehearsal = Rehearsal(tmp_path)
    first, _ = rehearsal.run(10)
    rehearsal.run(20)
    again, outcome = rehearsal.run(20)
    assert outcome.production == "stands"
    rollback(rehearsal.store, "bot")
    move = by_person(rehearsal.store, again.runtime, "bot", again.id)
    weights = first.artifacts["merge"]
    assert move.compared == {"key": weights.key, "digest": weights.digest}


def test_a_run_delivers_nothing_to_a_place_that_its_recipe_has_left(tmp_path: Path) -> None:
    """Who moves to another destination and clears the old one would find it filled again."""
    rehearsal = Rehearsal(tmp_path)
    rehearsal.run(20)
    shutil.rmtree(tmp_path / "out")
    _, outcome = rehearsal.run(10, to=str(tmp_path / "elsewhere"))
    assert outcome.production == "untouched"
    assert not (tmp_path / "out").exists() and not (tmp_path / "elsewhere").exists()
