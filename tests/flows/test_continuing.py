"""`fetch.continuing`: from which weights a run trains, on which shards, and that without new data nothing runs.

The models are made by hand (`rehearsal`): what counts here is what a stage would read.
"""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from flows.execute import execute
from flows.plan import make_plan
from flows.recipe import Loaded, Recipe
from flows.run import Run, start
from flows.settle import settle
from stages.errors import UserError
from stages.identity import Tree
from stages.runtime import Runtime
from stages.store import open_store
from tests.flows.conftest import tiny_recipe
from tests.flows.rehearsal import Rehearsal


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path, continuing=True, shards=("first", "second"))


def weights(run: Run) -> Tree:
    """What the run's training starts from."""
    return run.inputs("train")["model"]


def rows(run: Run) -> list[str]:
    """The shards it trains on."""
    found = list(run.inputs("convert")["rows"].folders())
    assert found.pop(0) == "questions/0", "what is held out is always there"
    return found


def model_of(run: Run) -> Tree:
    """What the run made."""
    return Tree(tuple(f for f in run.artifacts["merge"].tree.files if f.path != "merge.json"))


def fetched(rehearsal: Rehearsal, right: int) -> Run:
    """A run as it stands once its data is there."""
    run = rehearsal.start(right)
    return rehearsal.make(run, until="evaluate")


def test_the_first_training_starts_from_the_base_model_on_everything(rehearsal: Rehearsal) -> None:
    run, outcome = rehearsal.run(10)
    assert outcome.production == "moved"
    assert weights(run) == run.artifacts["fetch"].tree.folder("model")
    assert rows(run) == ["rows/0", "rows/1"]


def test_new_shards_alone_are_trained_on_from_productions_weights(rehearsal: Rehearsal) -> None:
    first, _ = rehearsal.run(10)
    rehearsal.shards = ("first", "second", "third")
    run = fetched(rehearsal, 20)
    assert weights(run) == model_of(first)
    assert run.inputs("merge")["model"] == model_of(first)
    assert run.inputs("evaluate")["base"] == run.artifacts["fetch"].tree.folder("model")
    assert rows(run) == ["rows/2"]
    assert make_plan(run).note == f"training goes on from run {first.id}, on 1 of 3 shards"


def test_a_shard_that_changed_is_new_and_one_that_moved_is_not(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    rehearsal.shards = ("before them", "first", "second, longer")
    assert rows(fetched(rehearsal, 20)) == ["rows/0", "rows/2"]


def test_without_new_data_nothing_runs(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    assert rehearsal.to_run(10) == []
    rehearsal.shards = ("first", "second", "third")
    second, outcome = rehearsal.run(20)
    assert outcome.production == "moved"
    assert rehearsal.to_run(20) == []
    again = rehearsal.start(20)
    make_plan(again)
    assert again.inputs("train") == second.inputs("train")


def test_each_training_goes_on_from_the_one_before(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    rehearsal.shards = ("first", "second", "third")
    second, _ = rehearsal.run(20)
    rehearsal.shards = ("first", "second", "third", "fourth")
    third = fetched(rehearsal, 30)
    assert weights(third) == model_of(second) and rows(third) == ["rows/3"]


def test_what_the_gate_refused_is_new_still(rehearsal: Rehearsal) -> None:
    first, _ = rehearsal.run(20)
    rehearsal.shards = ("first", "second", "third")
    _, outcome = rehearsal.run(5)
    assert not outcome.passed
    assert rehearsal.to_run(5) == [], "the same data again: it is known how that goes"
    rehearsal.shards = ("first", "second", "third", "fourth")
    run = fetched(rehearsal, 30)
    assert weights(run) == model_of(first) and rows(run) == ["rows/2", "rows/3"]


def test_data_that_was_deleted_makes_nothing_run(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    rehearsal.shards = ("first",)
    run = fetched(rehearsal, 10)
    assert rows(run) == ["rows/0", "rows/1"], "as production had them"


def test_a_run_that_goes_on_later_starts_where_it_would_have(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    rehearsal.shards = ("first", "second", "third")
    run = fetched(rehearsal, 20)
    run.record("running")
    rehearsal.run(30)  # production moves meanwhile
    record = rehearsal.store.read_run(run.id)
    assert record is not None
    resumed = start(run.loaded, run.runtime, rehearsal.store, record)
    make_plan(resumed)
    assert resumed.inputs("train") == run.inputs("train")


def test_rows_that_production_trained_on_cannot_measure_what_goes_on_from_it(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    rehearsal.questions, rehearsal.shards = "first", ("first", "second", "third")
    with pytest.raises(UserError, match=r"questions/0 is held out, .* trained on the same rows as rows/0"):
        fetched(rehearsal, 20)


def test_rows_that_only_measured_are_new_when_they_are_to_train(rehearsal: Rehearsal) -> None:
    first, _ = rehearsal.run(10)
    rehearsal.measures = False
    run = fetched(rehearsal, 20)
    assert list(run.inputs("convert")["rows"].folders()) == ["questions/0"]
    assert weights(run) == model_of(first)


def test_another_base_model_is_refused(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    rehearsal.base = "another"
    with pytest.raises(UserError, match=r"was trained from another fetch\.model"):
        fetched(rehearsal, 20)
    rehearsal.base = "one that is still to be fetched"
    with pytest.raises(UserError, match=r"was trained from another fetch\.model"):
        make_plan(rehearsal.start(30))
    assert "if there are none" in make_plan(rehearsal.start(30), ("fetch",)).note


def test_a_record_that_is_gone_is_told(rehearsal: Rehearsal) -> None:
    first, _ = rehearsal.run(10)
    rehearsal.store.objects.delete(f"runs/{first.id}.json")
    rehearsal.shards = ("first", "second", "third")
    with pytest.raises(UserError, match=re.escape(f"the record of run {first.id}")):
        fetched(rehearsal, 20)


@pytest.mark.full
def test_a_real_training_goes_on_from_a_real_one(tmp_path: Path, tiny_model: Path) -> None:
    """Two days of data: the second day's training starts from the first day's weights, and brings back more of its
    own rows than those of the first day have lost."""
    recipe = tiny_recipe(tmp_path, tiny_model)
    days = tmp_path / "days"
    days.mkdir()
    lines = (tmp_path / "echo.jsonl").read_text().splitlines(keepends=True)
    (days / "monday.jsonl").write_text("".join(lines[:100]))
    recipe["fetch"] |= {"continuing": True, "data": {**recipe["fetch"]["data"], "echo": {"files": str(days)}}}
    text = yaml.safe_dump(recipe)
    runtime = Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache")
    store = open_store(runtime.store, runtime.cache)

    def done() -> tuple[Run, list[str]]:
        run = start(Loaded(recipe=Recipe.model_validate(recipe), text=text, path=""), runtime, store)
        made = make_plan(run).to_run
        run.record("running")
        for stage in run.stages:
            execute(run, stage)
        run.record("finished", asdict(settle(run)))
        return run, made

    first, _ = done()
    (days / "tuesday.jsonl").write_text("".join(lines[100:]))
    second, made = done()
    assert "train" in made and second.artifacts["pack"].facts["rows"] == 100 + 40, "the new ones, and what is held out"
    assert second.inputs("train")["model"] == model_of(first)
    started, ended = (run.artifacts["train"].facts["first_loss"] for run in (first, second))
    assert ended < started, "what it starts from has been trained"
    assert done()[1] == []
