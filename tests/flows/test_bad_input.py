"""Bad input: one clear line with the place and the way out, and nothing half-written."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.execute import execute
from flows.recipe import Loaded, Recipe
from flows.run import start
from stages.errors import UserError
from stages.runtime import Runtime
from stages.store import Store, open_store

GOOD = {"messages": [{"role": "user", "content": "say hi"}, {"role": "assistant", "content": "hi"}]}

Pipeline = Callable[..., Store]


@pytest.fixture
def pipeline(tmp_path: Path, tiny_model: Path) -> Pipeline:
    """Runs stages of a tiny recipe on the given rows; returns the store."""

    def run(rows: list[Any] | str | None, upto: str = "pack", model: Path = tiny_model, **sections: Any) -> Store:
        data = tmp_path / "rows.jsonl"
        if rows is not None:
            text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            data.write_text(text)
        recipe = {
            "name": "bad",
            "fetch": {"model": {"path": str(model)}, "data": {"rows": {"files": str(data)}}},
            "pack": {"sequence_length": 64, "global_batch": 1},
        } | copy.deepcopy(sections)
        runtime = Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache")
        store = open_store(runtime.store, runtime.cache)
        this = start(Loaded(recipe=Recipe.model_validate(recipe), text="", path=""), runtime, store)
        for stage in ("fetch", "convert", "tokenize", "pack"):
            execute(this, stage)
            if stage == upto:
                return store
        raise AssertionError(upto)

    return run


def refused(pipeline: Pipeline, stage: str, tmp_path: Path, *args: Any, **options: Any) -> str:
    """Run until the error; return its text. Nothing of the failed stage may stand in the store."""
    with pytest.raises(UserError) as caught:
        pipeline(*args, **options)
    store = open_store(str(tmp_path / "store"), tmp_path / "cache")
    assert [s for s, _, _ in store.manifests() if s == stage] == []
    told = str(caught.value)
    assert "\n" not in told and "Traceback" not in told
    return told


@pytest.mark.parametrize(
    ("row", "kind"),
    [({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"), ({"prompt": "a", "level": 1}, "prompt")],
)
def test_rows_that_the_objective_does_not_train_on_are_told_before_they_are_tokenized(
    tmp_path: Path, tiny_model: Path, row: dict[str, Any], kind: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for objective in ("sft", "orpo", "grpo"):
        recipe = {
            "name": "kinds",
            "fetch": {"model": {"path": str(tiny_model)}, "data": {"rows": {"files": str(tmp_path / "rows.jsonl")}}},
            "train": {"objective": objective},
        }
        if objective == "grpo":
            recipe["train"]["objective_options"] = {"rewards": {"short": {"reward": "length", "options": {"most": 9}}}}
        runtime = Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache")
        loaded = Loaded(recipe=Recipe.model_validate(recipe), text="", path="")
        this = start(loaded, runtime, open_store(runtime.store, runtime.cache))
        for stage in ("fetch", "convert"):
            execute(this, stage)
        if (objective, kind) in (("orpo", "preference"), ("grpo", "prompt")):
            this.check_kind()
            continue
        told = f"{objective} trains on rows of kind .*, and the source `rows` holds rows of kind {kind}"
        with pytest.raises(UserError, match=told):
            this.check_kind()


def test_a_missing_file(pipeline: Pipeline, tmp_path: Path) -> None:
    assert "rows.jsonl" in refused(pipeline, "fetch", tmp_path, None)


def test_an_empty_data_set(pipeline: Pipeline, tmp_path: Path) -> None:
    assert "rows.jsonl" in refused(pipeline, "fetch", tmp_path, "")


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"text": "no messages"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"messages": "not a list"}, "messages"),
        ({"messages": [{"role": "user"}]}, "content"),
    ],
)
def test_a_bad_row_names_file_and_row(pipeline: Pipeline, tmp_path: Path, bad: Any, expected: str) -> None:
    told = refused(pipeline, "convert", tmp_path, [GOOD, bad, GOOD], "convert")
    assert "rows.jsonl, line 2: " in told and expected in told


def test_bad_rows_can_be_dropped_and_are_counted(pipeline: Pipeline, tmp_path: Path) -> None:
    other = {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}
    store = pipeline([GOOD, {"text": "x"}, other], convert={"bad_rows": "drop"})
    [facts] = [store.find(s, k).facts for s, k, _ in store.manifests() if s == "pack"]  # type: ignore[union-attr]
    assert sum(facts["dropped"].values()) == 1
    assert facts["documents"] == 2


def test_when_every_row_is_dropped_the_reasons_are_told(pipeline: Pipeline, tmp_path: Path) -> None:
    skipping = {"bad_rows": "drop", "format": "messages"}
    told = refused(pipeline, "pack", tmp_path, [{"text": "x"}, {"text": "y"}], convert=skipping)
    assert "of 2, convert dropped 2 missing field (the first: " in told and "line 1" in told


def test_malformed_json_names_its_line(pipeline: Pipeline, tmp_path: Path) -> None:
    told = refused(pipeline, "convert", tmp_path, json.dumps(GOOD) + "\n{broken\n", "convert")
    assert "rows.jsonl, line 2: is not JSON" in told


def test_a_template_that_fails_names_the_row(pipeline: Pipeline, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'say hi' %}{{ raise_exception('no greetings') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    told = refused(pipeline, "convert", tmp_path, [GOOD], "convert", convert={"template": template})
    assert "rows.jsonl, line 1: " in told and "no greetings" in told


def test_a_model_without_a_chat_template_names_the_mend(pipeline: Pipeline, tmp_path: Path, tiny_model: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("chat_template*"))
    told = refused(pipeline, "convert", tmp_path, [GOOD], "convert", model=bare)
    assert "convert.template" in told and "chatml" in told


def test_nothing_to_train_on(pipeline: Pipeline, tmp_path: Path) -> None:
    told = refused(pipeline, "pack", tmp_path, [{"messages": [{"role": "user", "content": "alone"}]}])
    assert "nothing to train on" in told and "train_on" in told


LONG = {"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}]}


def test_overlong_rows_by_policy(pipeline: Pipeline, tmp_path: Path) -> None:
    pack = {"sequence_length": 64, "global_batch": 1}
    told = refused(pipeline, "pack", tmp_path, [GOOD, LONG], pack=pack | {"overlong": "error"})
    assert "row 2" in told and "64" in told
    store = pipeline([GOOD, LONG], pack=pack | {"overlong": "drop"})
    [facts] = [store.find(s, k).facts for s, k, _ in store.manifests() if s == "pack"]  # type: ignore[union-attr]
    assert facts["documents"] == 1 and facts["dropped"] == {"overlong": 1}


def test_a_missing_model_folder(pipeline: Pipeline, tmp_path: Path) -> None:
    assert "nowhere" in refused(pipeline, "fetch", tmp_path, [GOOD], model=tmp_path / "nowhere")


def test_a_model_of_pickles_is_refused(pipeline: Pipeline, tmp_path: Path, tiny_model: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "safetensors" in refused(pipeline, "fetch", tmp_path, [GOOD], model=pickled)


def test_a_store_that_cannot_be_written() -> None:
    with pytest.raises(UserError, match="/proc/nowhere"):
        open_store("/proc/nowhere/store", Path("/tmp"))


def test_code_of_ones_own_is_refused_before_anything_runs(tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text("raise SystemExit('it ran')")
    rewards = {"rewards": {"mine": {"reward": str(own)}}}
    recipe = {
        "name": "bad",
        "fetch": {"model": {"path": str(tmp_path)}, "data": {"rows": {"files": str(tmp_path / "nowhere.jsonl")}}},
        "convert": {"format": "prompt_only"},
        "train": {"objective": "grpo", "objective_options": rewards},
    }
    runtime = Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache")
    loaded = Loaded(recipe=Recipe.model_validate(recipe), text="", path="")
    with pytest.raises(UserError, match=r"train\.objective_options\.rewards\.mine names a Python file.*--allow-code"):
        start(loaded, runtime, open_store(runtime.store, runtime.cache))
