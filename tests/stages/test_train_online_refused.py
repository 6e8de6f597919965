"""Online objectives: what cannot be trained so is told, and where, before anything is."""

from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.train import TrainConfig
from tests.stages.packed import Packed
from tests.stages.test_train_online import inputs, prompts, recipe, train

__all__ = ["inputs"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rewards": {}}, "name at least one"),
        ({"rewards": {"a": {"reward": "nope"}}}, "there is no reward 'nope'"),
        ({"loss": "luspo"}, "set importance: sequence"),
        ({"loss": "cispo"}, "set it above 1, e.g. 5"),
        ({"loss": "cispo", "epsilon_high": 0.28}, "set it above 1, e.g. 5"),
        ({"loss": "cispo", "epsilon_high": 5.0, "epsilon": 0.1}, "epsilon does nothing for loss cispo: take it out"),
        ({"loss": "sapo", "epsilon": 0.1}, "epsilon does nothing for loss sapo"),
        ({"loss": "sapo", "epsilon_high": 0.28}, "epsilon_high does nothing for loss sapo"),
        ({"loss": "vespo", "epsilon": 0.1}, "epsilon does nothing for loss vespo"),
        ({"loss": "vespo", "epsilon_high": 0.28}, "epsilon_high does nothing for loss vespo"),
        ({"loss": "vespo", "importance": "sequence"}, "importance does nothing for loss vespo"),
        ({"loss": "bnpo"}, "over a whole step that is dapo: set loss: dapo"),
        (
            {
                "rewards": {},
                "environment": {"name": "openenv", "options": {"url": "http://127.0.0.1"}},
                "reward_seconds": 5.0,
            },
            "reward_seconds: there are no rewards: an environment's limit is environment.seconds",
        ),
        ({"objective": "gdpo"}, "several rewards"),
        ({"group_size": 1}, "group_size"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainConfig.model_validate(recipe(tmp_path, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"quantize": "nf4", "method": "lora"},
        {"ema": 0.9},
        {"evaluate_every": 0.5},
        {"neftune_alpha": 5.0},
        {"on_spike": "stop"},
        {"full": {"only": ["mlp"]}},
        {"method": "lora", "lora": {"dropout": 0.1}},
        {"method": "lora", "lora": {"restart_every": 5}},
        {"method": "lora", "lora": {"init": "eva"}},
    ],
)
def test_what_an_online_objective_would_not_read_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"grpo trains on what the model itself writes, without it; take it out"):
        TrainConfig.model_validate({**recipe(tmp_path), **change})


@pytest.mark.parametrize("lora", [{"new_tokens": ["a"]}, {"targets": ["q_proj", "lm_head"]}])
@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_an_adapter_that_the_loss_would_not_see_is_refused(
    tmp_path: Path, inputs: dict[str, Path], objective: str, lora: dict[str, Any]
) -> None:
    config = recipe(tmp_path, objective) | {"method": "lora", "lora": {"rank": 4, **lora}}
    with pytest.raises(UserError, match=f"{objective} reads the weights of lm_head themselves, past an adapter"):
        train(tmp_path, inputs, config, allow_code=True)


def test_what_a_run_needs_is_asked_for_before_anything_is_loaded(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="--allow-code"):
        train(tmp_path / "1", inputs, recipe(tmp_path))
    missing = recipe(tmp_path, rewards={"right": {"reward": "exact_match", "options": {"field": "gold"}}})
    with pytest.raises(UserError, match=r"the reward right reads the column 'gold'; a prompt has answer"):
        train(tmp_path / "2", inputs, missing)


def test_a_prompt_that_leaves_no_room_for_its_completion_is_named(tmp_path: Path, tiny_model: Path) -> None:
    prompts(tmp_path / "tokens", tiny_model, ["say one\n", "x" * 245, "x" * 244])
    plan = Packed(tmp_path / "tokens", tmp_path / "plan", sequence_length=256).output
    inputs = {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": plan}
    told = r"asked/00000 row 2: a prompt of 245 tokens and max_new_tokens 12 are more than the 256 .* lower "
    with pytest.raises(UserError, match=told):
        train(tmp_path / "1", inputs, recipe(tmp_path, steps=1), allow_code=True)
    _, facts = train(tmp_path / "2", inputs, recipe(tmp_path, steps=1, max_new_tokens=11), allow_code=True)
    assert facts["prompts"] == 3


@pytest.mark.parametrize(
    ("runtime", "told"),
    [
        ({"ranks": 2}, "asks for `ranks: 2`, and train.objective grpo trains on one device alone: set ranks to auto"),
        ({"shard": "fsdp"}, "asks for `shard: fsdp`, and .* set shard to none"),
        ({"trackers": "comet"}, r"the tracker comet, and it is not installed: pip install 'regrow\[comet\]'"),
    ],
)
def test_a_runtime_that_it_cannot_follow_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr("stages.train.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=told):
        train(tmp_path, {"model": tmp_path / "none"}, recipe(tmp_path), **runtime)
