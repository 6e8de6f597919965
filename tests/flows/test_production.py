"""Runs against the model in production: compared with it, promoted over it or not, and never twice for nothing."""

import json
from pathlib import Path

import pytest

from flows.execute import execute
from flows.promotion import promote
from flows.run import start
from stages.errors import UserError
from stages.objects import blob_path
from stages.production import production, rollback
from tests.flows.rehearsal import Rehearsal


def stands(rehearsal: Rehearsal) -> str:
    found = production(rehearsal.store, rehearsal.name)
    assert found is not None
    return found.now.run


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path)


def test_each_model_is_compared_with_the_one_that_stands_and_replaces_it(rehearsal: Rehearsal) -> None:
    first, outcome = rehearsal.run(10)
    assert outcome.production == "moved" and "production" not in rehearsal.scores(first)
    second, outcome = rehearsal.run(20)
    assert outcome.production == "moved"
    assert rehearsal.scores(second)["production"]["value"] == 0.25
    assert rehearsal.scores(second)["over_production"]["better"] == "tuned"
    assert stands(rehearsal) == second.id
    assert json.loads((rehearsal.folder / "out/lineage.json").read_text())["run"] == second.id


def test_what_stands_has_nothing_to_do_however_often_it_is_looked_at(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    assert rehearsal.to_run(10) == []
    rehearsal.run(20)
    for _ in range(2):
        assert rehearsal.to_run(20) == []
        assert rehearsal.run(20)[1].production == "stands"


def test_the_same_bytes_made_once_more_are_the_model_that_stands(rehearsal: Rehearsal) -> None:
    """Or the next rollback would bring back the very model that it is to take away."""
    first, _ = rehearsal.run(10)
    second, _ = rehearsal.run(20)
    rehearsal.base = "the same base model in other bytes"
    again, outcome = rehearsal.run(20)
    assert again.artifacts["merge"].digest == second.artifacts["merge"].digest
    assert again.artifacts["merge"].key != second.artifacts["merge"].key and outcome.production == "stands"
    with pytest.raises(UserError, match="already names this model"):
        promote(rehearsal.store, again.runtime, "bot", again.id)
    assert rollback(rehearsal.store, "bot").run == first.id


def test_a_model_that_is_worse_than_production_stays_out(rehearsal: Rehearsal) -> None:
    good, _ = rehearsal.run(30)
    worse, outcome = rehearsal.run(10)
    assert not outcome.passed and outcome.production == "untouched"
    assert outcome.reasons[0].startswith("spelling: clearly worse than the model in production, -0.500")
    assert rehearsal.scores(worse)["better"] == "tuned", "although it beats the base model"
    assert stands(rehearsal) == good.id
    assert json.loads((rehearsal.folder / "out/lineage.json").read_text())["run"] == good.id
    assert rehearsal.to_run(10) == []


def test_production_that_moved_meanwhile_is_left_alone(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    slow = rehearsal.make(rehearsal.start(20))
    quick, _ = rehearsal.run(30)
    from flows.settle import settle

    assert settle(slow).production == "elsewhere"
    assert stands(rehearsal) == quick.id
    assert json.loads((rehearsal.folder / "out/lineage.json").read_text())["run"] == quick.id
    again = rehearsal.run(20)[0]
    assert rehearsal.scores(again)["production"]["value"] == 0.75, "the next run compares with the new one"


def test_a_model_that_was_rolled_back_does_not_come_back_by_itself(rehearsal: Rehearsal) -> None:
    first, _ = rehearsal.run(10)
    rehearsal.run(20)
    rollback(rehearsal.store, "bot")
    assert rehearsal.to_run(20) == []
    assert rehearsal.run(20)[1].production == "stood"
    assert stands(rehearsal) == first.id


def test_a_run_that_goes_on_compares_with_what_stood_when_it_started(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    run = rehearsal.start(20)
    run.record("started")
    rehearsal.run(30)
    resumed = start(run.loaded, run.runtime, run.store, run.store.read_run(run.id))
    assert resumed.production and resumed.production.now.model == run.production.now.model  # type: ignore[union-attr]
    rehearsal.make(resumed)
    assert rehearsal.scores(resumed)["production"]["value"] == 0.25


def test_a_model_that_the_store_has_lost_is_told_with_the_mend(rehearsal: Rehearsal) -> None:
    run, _ = rehearsal.run(10)
    run.store.objects.delete(f"actions/merge/{run.artifacts['merge'].key}.json")
    with pytest.raises(UserError, match=r"names a model that .* no longer holds.*regrow promote bot"):
        rehearsal.make(rehearsal.start(20))


def test_a_model_whose_files_the_store_has_lost_is_told_where_they_are_read(rehearsal: Rehearsal) -> None:
    """Notes of damage and the advice to look for more would leave people with a ref that stops every run."""
    first, _ = rehearsal.run(10)
    run = rehearsal.make(rehearsal.start(20))
    [weights] = [file.sha256 for file in first.artifacts["merge"].tree.files if file.path == "right"]
    rehearsal.store.objects.delete(blob_path(weights))
    assert execute(run, "evaluate").hit, "nothing reads them"
    with pytest.raises(
        UserError, match=r"names a model that .* no longer holds \(merge .*right: blob.*regrow rollback bot"
    ):
        execute(run, "evaluate", force=True)
