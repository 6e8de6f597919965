"""Reward models in a recipe: a key has what the model is and not where it lies, only where it is asked; a name that is
not there is told when the recipe is read."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.local import _scores
from flows.pages import scores_page
from flows.recipe import Loaded, Recipe, loads
from flows.run import Run, start
from stages.errors import UserError
from stages.evaluate import EvaluateConfig, parts
from stages.runtime import Runtime
from stages.stage import part_action
from stages.store import open_store
from tests.flows.test_dashboard import picture, texts
from tests.stages.fetching import bring, home, model_folder

__all__ = ["home"]

CLASSIFIER = json.dumps({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}).encode()
STEPWISE = json.dumps({"architectures": ["LlamaForTokenClassification"], "step_separator": "\n"}).encode()
RECIPE: dict[str, Any] = {
    "name": "judged",
    "fetch": {"model": {"path": "model"}, "data": {"asked": {"files": "asked.jsonl"}}},
    "convert": {"format": "prompt_only"},
    "train": {
        "objective": "grpo",
        "objective_options": {"rewards": {"short": {"reward": "length", "options": {"most": 9}}}},
    },
    "evaluate": {"tasks": {"right": {"source": "asked", "eval": "exact_match"}}, "heldout_loss": False},
}
WORTH = {"worth": {"reward": "reward_model", "options": {"model": "kind"}}}


def judge(folder: Path, **extra: bytes) -> Path:
    """A reward model's folder; nobody loads it here."""
    return model_folder(folder, **{"config.json": CLASSIFIER, "chat_template.jinja": b"t", **extra})


@pytest.fixture
def recipe(home: Path) -> dict[str, Any]:
    """One whose reward model scores both rewards and a task."""
    model_folder(home / "model")
    judge(home / "kind")
    (home / "asked.jsonl").write_text('{"prompt": "a", "question": "a", "answer": "b"}\n')
    asked = copy.deepcopy(RECIPE)
    asked["fetch"]["reward_models"] = {"kind": {"path": "kind"}}
    asked["train"]["objective_options"]["rewards"] |= copy.deepcopy(WORTH)
    asked["evaluate"]["tasks"]["worth"] = {"source": "asked", "reward_model": "kind"}
    return asked


def run_of(home: Path, recipe: dict[str, Any]) -> Run:
    """A run that has fetched, and has everything that train and evaluate read."""
    store = open_store(str(home / "store"), home / "cache")
    run = start(Loaded(recipe=Recipe.model_validate(recipe), text="", path=""), Runtime(), store)
    made = home / "made" / run.id
    for part in run.parts:
        bring(part, made / "fetch" / part.name)
    for stage in ("fetch", "convert", "tokenize", "pack", "train", "merge"):
        action = run.action(stage)
        assert action is not None
        if stage != "fetch":
            (made / stage).mkdir()
            (made / stage / "made.arrow").write_text(stage)
        run.artifacts[stage] = store.commit(action, made / stage, {}, {})
    return run


def keys(home: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """Of train, evaluate and evaluate's parts."""
    run = run_of(home, recipe)
    found = {stage: action.key for stage in ("train", "evaluate") if (action := run.action(stage))}
    config = run.config("evaluate")
    assert isinstance(config, EvaluateConfig)
    from flows.graph import stage_named

    return found | {p.name: part_action(stage_named("evaluate"), p).key for p in parts(config, run.inputs("evaluate"))}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_another_model_moves_what_it_judges_and_another_place_moves_nothing(home: Path, recipe: dict[str, Any]) -> None:
    before = keys(home, recipe)
    judge(home / "kind-2", **{"README.md": b"published again"})
    moved = copy.deepcopy(recipe)
    moved["fetch"]["reward_models"]["kind"]["path"] = str(home / "kind-2")
    assert changed(before, keys(home, moved)) == set()
    (home / "kind/model.safetensors").write_bytes(b"trained again, in the same folder")
    assert changed(before, keys(home, recipe)) == {"train", "evaluate", "base/worth", "tuned/worth"}


def test_a_model_that_nobody_asks_enters_no_key(home: Path, recipe: dict[str, Any]) -> None:
    alone, beside = copy.deepcopy(RECIPE), copy.deepcopy(RECIPE)
    beside["fetch"]["reward_models"] = recipe["fetch"]["reward_models"]
    assert keys(home, alone) == keys(home, beside)
    inputs = run_of(home, alone).inputs("train")
    assert "reward_models" not in inputs and "reward_models" not in run_of(home, alone).inputs("evaluate")
    other = copy.deepcopy(recipe)
    judge(home / "strict")
    other["fetch"]["reward_models"]["strict"] = {"path": "strict"}
    other["evaluate"]["tasks"]["strictly"] = {"source": "asked", "reward_model": "strict"}
    assert changed(keys(home, recipe), keys(home, other)) == {"evaluate"}, "train asks only the one"
    assert {file.path.split("/")[0] for file in run_of(home, other).inputs("train")["reward_models"].files} == {"kind"}


@pytest.mark.parametrize(
    ("section", "told"),
    [
        (
            {"train": WORTH},
            "there is no reward model `kind`; fetch.reward_models has none: name it there, e.g. `reward_mod",
        ),
        (
            {"train": {"w": {"reward": "reward_model", "options": {"model": "out/reward"}}}},
            "no reward model `out/reward`",
        ),
        ({"train": {"w": {"reward": "reward_model"}}}, "reward_model: model: Field required"),
        ({"evaluate": {"w": {"source": "asked", "reward_model": "knid"}}}, "there is no reward model `knid`"),
        ({"evaluate": {"w": {"lm_eval": "gsm8k", "reward_model": "kind"}}}, "`reward_model` scores rows of a `source`"),
        ({"fetch": {"kind": {"path": "m", "new_tokens": ["<a>"]}}}, "kind: new_tokens are for a model that is trained"),
        ({"fetch": {"kind": {}}}, "expected exactly one of package, path, hub, url; none given"),
    ],
)
def test_a_mistake_is_told_when_the_recipe_is_read(section: dict[str, Any], told: str) -> None:
    recipe = copy.deepcopy(RECIPE)
    recipe["train"]["objective_options"]["rewards"] |= section.get("train", {})
    recipe["evaluate"]["tasks"] |= section.get("evaluate", {})
    recipe["fetch"]["reward_models"] = section.get("fetch", {})
    with pytest.raises(UserError) as caught:
        loads(yaml.safe_dump(recipe), "judged.yaml")
    assert told in str(caught.value) and str(caught.value).startswith("judged.yaml:")


def test_the_recipe_in_the_documentation_is_right() -> None:
    page = (Path(__file__).parents[2] / "docs/objectives.md").read_text()
    (judged,) = (
        told for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "fetch" in (told := yaml.safe_load(block))
    )
    whole = RECIPE | judged | {"fetch": RECIPE["fetch"] | judged["fetch"]}
    asked = loads(yaml.safe_dump(whole), "judged.yaml").recipe.train.reward_models
    assert [*asked.values()] == ["terse"]


def test_a_folder_without_a_reward_model_is_told_before_anything_is_fetched(home: Path, recipe: dict[str, Any]) -> None:
    for name, told in (
        ("model", "fetch.reward_models.kind: is no reward model but"),
        ("gone", "there is no folder gone"),
    ):
        recipe["fetch"]["reward_models"]["kind"]["path"] = name
        with pytest.raises(UserError, match=told):
            run_of(home, recipe)


@pytest.mark.parametrize("section", ["train", "evaluate"])
def test_steps_of_a_model_that_knows_none_are_told_before_anything_is_fetched(
    home: Path, recipe: dict[str, Any], section: str
) -> None:
    recipe = copy.deepcopy(recipe)
    if section == "train":
        recipe["train"]["objective_options"]["rewards"]["worth"]["options"]["steps"] = "product"
        place = "train.objective_options.rewards.worth.options.steps"
    else:
        recipe["evaluate"]["tasks"]["worth"]["steps"] = "product"
        place = "evaluate.tasks.worth.steps"
    with pytest.raises(UserError, match=f"^{place}: this reward model gives a whole answer one number.*: take `steps`"):
        run_of(home, recipe)
    (home / "kind/config.json").write_bytes(STEPWISE)
    before = keys(home, recipe)
    recipe["train"]["objective_options"]["rewards"]["worth"]["options"]["steps"] = "mean"
    recipe["evaluate"]["tasks"]["worth"]["steps"] = "mean"
    assert changed(before, keys(home, recipe)) == {"train", "evaluate", "base/worth", "tuned/worth"}


@pytest.mark.parametrize("section", ["train", "evaluate"])
def test_steps_of_a_model_that_was_fetched_are_told_before_anything_is_trained(
    home: Path, recipe: dict[str, Any], section: str
) -> None:
    """Of a model from elsewhere only what was fetched tells."""
    recipe["fetch"]["reward_models"]["kind"] = {"url": (home / "kind").as_uri()}
    if section == "train":
        recipe["train"]["objective_options"]["rewards"]["worth"]["options"]["steps"] = "product"
    else:
        recipe["evaluate"]["tasks"]["worth"]["steps"] = "product"
    run = run_of(home, recipe)
    run.refuse_steps("evaluate" if section == "train" else "train")
    with pytest.raises(UserError, match=rf"^{section}\..*worth.*steps: this reward model gives a whole answer one"):
        run.refuse_steps(section)


@pytest.mark.parametrize(
    ("task", "field"), [("right", "answer"), ("right", "question"), ("worth", "question"), ("plain", "answer")]
)
def test_a_task_that_cannot_ask_its_rows_is_told_before_anything_is_trained(
    home: Path, recipe: dict[str, Any], task: str, field: str
) -> None:
    recipe = copy.deepcopy(recipe)
    recipe["evaluate"]["tasks"]["plain"] = {"source": "asked"}  # through lm-eval
    run_of(home, recipe).check_tasks()
    recipe["evaluate"]["tasks"][task][field] = "nothing"
    told = (
        rf"^evaluate\.tasks\.{task}: asked/00000/.*rows\.jsonl line 1: .*'nothing'.* has only prompt, question, answer"
    )
    with pytest.raises(UserError, match=told):
        run_of(home, recipe).check_tasks()


def test_a_conversation_that_the_model_before_training_cannot_be_asked_is_told_before_anything_is_trained(
    home: Path, recipe: dict[str, Any], tiny_model: Path
) -> None:
    """A model that was trained through a template has one, and the base model need not."""
    shutil.copytree(tiny_model, home / "model", dirs_exist_ok=True)
    template = home / "model/chat_template.jinja"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    (home / "asked.jsonl").write_text(json.dumps({"prompt": "a", "question": turns, "answer": "b"}))
    recipe["evaluate"]["tasks"] = {"worth": {"source": "asked", "reward_model": "kind"}}
    run_of(home, recipe).check_tasks()
    told = r"^evaluate\.tasks\.worth: asked/00000/.*line 1: the model has no chat template, .* of system, user: take"
    text = template.read_text()
    template.unlink()
    with pytest.raises(UserError, match=told):
        run_of(home, recipe).check_tasks()
    template.write_text("{{ raise_exception('no system turn') if messages[0].role == 'system' }}" + text)
    with pytest.raises(UserError, match=r"does not take the turns system, user: .*no system turn"):
        run_of(home, recipe).check_tasks()
    (home / "asked.jsonl").write_text(json.dumps({"prompt": "a", "question": "a", "answer": "b"}))
    run_of(home, recipe).check_tasks()


def test_a_reward_is_shown_as_a_number_beside_shares() -> None:
    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.25, "high": value + 0.25}

    models = {"base": interval(-7.5), "tuned": interval(-2.25), "difference": interval(5.25), "better": "tuned"}
    share = {"base": interval(0.5), "tuned": interval(0.5), "difference": interval(0.0), "better": "unclear"}
    tasks = {
        "right": {"metric": "exact_match", "n": 40, **share},
        "worth": {"metric": "reward by kind", "unbounded": True, "n": 40, **models},
    }
    scores = {"tasks": tasks, "heldout_loss": None}
    page = scores_page(scores)
    first, _, second = page.partition("\n\n")
    assert "score, with its 95 % interval" in texts(picture(first)) and "-7.5" not in texts(picture(first))
    assert "reward, with its 95 % interval" in texts(picture(second)) and "-7.5" in texts(picture(second))
    assert "-2.250 [-2.500" in page
    labels, _, tuned = ([*column.cells] for column in _scores(scores).columns[:3])
    assert labels == ["right % of 40", "worth, reward of 40"]
    assert tuned == ["50.0 [25.0, 75.0]", "-2.25 [-2.50, -2.00]"]
