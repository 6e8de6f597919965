"""A run that goes on: with the recipe that it began with, whatever became of the files that this names."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.history import events_of
from flows.promotion import promote, rollback
from flows.recipe import load
from flows.run import Run, start
from flows.stored import recorded
from stages.errors import UserError
from stages.runtime import Runtime
from stages.store import Store, open_store
from tests.flows.rehearsal import Rehearsal

FORMAT = """from stages.formats import Conversation, Format, Turn
FORMAT = Format(lambda row, options: Conversation([Turn("user", row["text"] + "{0}")]))
"""
REWARD = "from stages.rewards import Reward\nREWARD = Reward(1, lambda completion, row, options: {0})\n"
TEMPLATE = "{{% for m in messages %}}{0}{{{{ m.content }}}}{{% endfor %}}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), tmp_path / "cache")


def begun(folder: Path, model: Path, store: Store, **sections: Any) -> tuple[Run, Runtime]:
    """A run that has its record, and where it happens."""
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    fetch = {"model": {"path": str(model)}, "data": {"rows": {"files": str(folder / "rows.jsonl")}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "own", "fetch": fetch, **sections}))
    runtime = Runtime(store=store.url, cache=store.cache, allow_code=True)
    run = start(load(folder / "recipe.yaml"), runtime, store)
    run.record("suspended")
    return run, runtime


def test_what_a_recipes_own_files_said_when_a_run_began_is_what_it_goes_on_with(
    tmp_path: Path, tiny_model: Path, store: Store
) -> None:
    files = {"format.py": FORMAT, "template.jinja": TEMPLATE, "reward.py": REWARD}
    for name, text in files.items():
        (tmp_path / name).write_text(text.format(1))
    rewards = {"mine": {"reward": str(tmp_path / "reward.py")}}
    run, runtime = begun(
        tmp_path,
        tiny_model,
        store,
        convert={"format": str(tmp_path / "format.py"), "template": str(tmp_path / "template.jinja")},
        train={"objective": "grpo", "objective_options": {"rewards": rewards}},
        pack={"overlong": "drop"},
    )
    for name, text in files.items():
        (tmp_path / name).write_text(text.format(2))
    (tmp_path / "reward.py").unlink()
    record = store.read_run(run.id)
    assert record is not None
    again = start(recorded(record), runtime, store, record)
    assert again.loaded == run.loaded
    assert again.loaded.recipe.convert.code == FORMAT.format(1)
    assert again.parts == run.parts


def test_a_record_without_the_recipe_as_it_was_is_read_by_its_text(
    tmp_path: Path, tiny_model: Path, store: Store
) -> None:
    run, _ = begun(tmp_path, tiny_model, store)
    record = store.read_run(run.id)
    assert record is not None
    del record["asked"]
    assert recorded(record) == run.loaded


def test_a_run_that_goes_on_keeps_its_model_until_it_has_another(tmp_path: Path) -> None:
    """Or a run that is taken up under a newer version would lose its card at once, and with it the way to its model."""
    rehearsal = Rehearsal(tmp_path)
    other, _ = rehearsal.run(10)
    run, _ = rehearsal.run(20)
    rollback(rehearsal.store, run.runtime, "bot")
    before = rehearsal.store.read_run(run.id)
    assert before is not None

    again = start(recorded(before), run.runtime, rehearsal.store, before)
    made = {stage: other.artifacts[stage] for stage in ("fetch", "train", "merge")}
    for found in ({}, made):
        again.artifacts = dict(found)
        again.record("running")
        now = rehearsal.store.read_run(run.id)
        assert now is not None
        assert [now[part] for part in ("stages", "outcome", "scores")] == [
            before[part] for part in ("stages", "outcome", "scores")
        ]
        assert {stage: told["key"] for stage, told in now["under_way"].items()} == {s: a.key for s, a in found.items()}
    assert promote(rehearsal.store, run.runtime, "bot", run.id).model["key"] == run.artifacts["merge"].key

    again.artifacts["publish"] = other.artifacts["publish"]
    again.record("finished", {"production": "waits", "reasons": []})
    now = rehearsal.store.read_run(run.id)
    assert now is not None and "under_way" not in now and now["outcome"]["production"] == "waits"
    assert now["stages"]["merge"]["key"] == other.artifacts["merge"].key


def test_a_run_that_goes_on_and_fails_is_told_as_failed(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path)
    run, _ = rehearsal.run(20, approval=True)
    record = rehearsal.store.read_run(run.id)
    assert record is not None
    start(recorded(record), run.runtime, rehearsal.store, record).record_end(UserError("out of luck"))
    [event] = events_of(rehearsal.store, "bot")
    assert (event.what, event.why) == ("failed", "out of luck")
