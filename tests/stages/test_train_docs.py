"""docs/training-methods.md names everything that the code offers."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from stages.train import Full, Lora, TrainConfig
from stages.train.optimizers import OPTIMIZERS
from tests.stages.test_train_architectures import REFUSED, TRAINED

TEXT = (Path(__file__).parents[2] / "docs" / "training-methods.md").read_text("utf-8")
WORDS = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S)))
ELSEWHERE = {"objective", "objective_options", "seed", "on_spike"}
"""Keys that other pages are about, and the seed."""


def literals(model: Any, field: str) -> tuple[str, ...]:
    return tuple(a for a in get_args(model.model_fields[field].annotation) if isinstance(a, str))


def test_every_optimizer_is_in_its_table_with_its_extra() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    for name, kind in OPTIMIZERS.items():
        (row,) = [line for line in rows if f"`{name}`" in line]
        assert row.rstrip(" |").endswith(f"`{kind.extra}`") == bool(kind.extra), name


@pytest.mark.parametrize(("model", "field"), [(TrainConfig, "schedule"), (TrainConfig, "precision"), (Lora, "init")])
def test_every_choice_is_named(model: Any, field: str) -> None:
    for choice in literals(model, field):
        assert choice in WORDS or f"{field}: {choice}" in WORDS, choice


def test_every_key_is_named() -> None:
    for prefix, model in (("", TrainConfig), ("lora.", Lora), ("full.", Full)):
        for field in model.model_fields:
            if field not in ELSEWHERE:
                assert f"{prefix}{field}" in TEXT, field


def test_its_examples_are_recipes() -> None:
    for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.S):
        TrainConfig.model_validate(yaml.safe_load(block)["train"])


@pytest.mark.parametrize("names", [TRAINED, REFUSED])
def test_every_architecture_that_is_tested_is_named(names: dict[str, Any]) -> None:
    missing = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", TEXT)]
    assert not missing
