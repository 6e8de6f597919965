"""What train refuses, before or while it works, and how it says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from stages.errors import UserError
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.train import STAGE, TrainConfig
from stages.train.data import step_order
from tests.stages import tiny


def train(folder: Path, inputs: dict[str, Path], **config: Any) -> Facts:
    output = folder / "output"
    output.mkdir(parents=True)
    return STAGE.run(TrainConfig.model_validate(config), inputs, output, Work(folder / "work", Runtime(device="cpu")))


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    return {"model": tiny.llama(tmp_path / "model"), **tiny.plan(tmp_path, tiny.documents(12))}


def test_an_unknown_layer_lists_those_that_exist(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"'query'.*down_proj.*q_proj.*v_proj"):
        train(tmp_path, inputs, lora={"targets": ["q_proj", "query"]})


def test_a_rank_beyond_the_layer_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"rank is 33, but .*proj is only \d+ wide"):
        train(tmp_path, inputs, lora={"rank": 33})


def test_an_adapter_on_a_tied_head_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    tied = tiny.llama(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UserError, match="'lm_head' shares its weights"):
        train(tmp_path, {**inputs, "model": tied}, lora={"targets": ["lm_head"]})


def test_documents_beyond_learned_positions_are_refused_and_beyond_others_told(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    plan = tiny.plan(tmp_path / "long", [[5 + n % 50 for n in range(70)]] * 4, sequence_length=128)
    learned = tiny.save(tmp_path / "gpt", "GPT2Config", max_position_embeddings=64, n_positions=64)
    told = r"documents have up to 70 tokens, and the model 64 positions .* set pack.sequence_length: 64"
    with pytest.raises(UserError, match=told):
        train(tmp_path, {**plan, "model": learned})
    rotary = tiny.llama(tmp_path / "rotary", max_position_embeddings=64)
    facts: Any = train(tmp_path / "rotary", {**plan, "model": rotary}, max_steps=1, precision="fp32")
    (note,) = facts["notes"]
    assert "up to 70 tokens, and the model 64 positions" in note and "is new to it" in note


def test_prompts_alone_are_no_plan_without_training(tmp_path: Path, inputs: dict[str, Path]) -> None:
    path = inputs["plan"] / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "prompt"}))
    with pytest.raises(UserError, match=r"sft trains on rows of kind .*, and the plan holds rows of kind prompt"):
        train(tmp_path, inputs)


def test_an_empty_plan_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="nothing to train on"):
        train(tmp_path, {**inputs, **tiny.plan(tmp_path / "empty", [])})


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    small = tiny.llama(tmp_path / "small", vocab_size=40)
    with pytest.raises(UserError, match=r"chat/00000: .*token 62, but the model embeds only 40"):
        train(tmp_path, {**inputs, "model": small})


def test_a_model_that_packing_would_change_is_refused_by_name(tmp_path: Path, inputs: dict[str, Path]) -> None:
    mamba = tiny.save(tmp_path / "mamba", "MambaConfig", state_size=8)
    with pytest.raises(UserError, match="mamba cannot be packed"):
        train(tmp_path, {**inputs, "model": mamba}, lora={"targets": ["in_proj"]})


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        train(tmp_path, {**inputs, "model": tmp_path / "nothing"})


def test_a_loss_that_is_no_number_names_the_step_and_its_rows(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model", vocab_size=50000)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.get_input_embeddings().weight[60] = float("nan")
    loaded.save_pretrained(model)
    rows = [[5, 6, 7, 8], [15, 16, 17, 18], [58, 59, 60, 61]]
    plan = tiny.plan(tmp_path, rows, global_batch=1, packed=False)
    with pytest.raises(UserError, match=r"loss is nan in step 3.*chat/00000 row 13"):
        train(tmp_path, {"model": model, **plan})
    assert not any((tmp_path / "output").iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"warmup": -1},
        {"epochs": 0},
        {"max_steps": 0},
        {"lora": {"rank": 0}},
        {"lora": {"targets": []}},
        {"method": "qlora"},
        {"learningrate": 1e-3},
        {"betas": [0.9, 1.0]},
    ],
    ids=str,
)
def test_values_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainConfig.model_validate(wrong)


def test_the_order_of_target_names_does_not_enter_the_key() -> None:
    one = TrainConfig.model_validate({"lora": {"targets": ["v_proj", "q_proj"]}})
    other = TrainConfig.model_validate({"lora": {"targets": ["q_proj", "v_proj"]}})
    assert STAGE.identity(one) == STAGE.identity(other)


@given(steps=st.integers(1, 20), epochs=st.integers(1, 4), cut=st.integers(0, 19), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_takes_every_step_once(steps: int, epochs: int, cut: int, seed: int) -> None:
    total = steps * epochs
    order = step_order([0, 3 * steps], 3, total, seed)
    assert order[:steps] == list(range(steps))
    for epoch in range(epochs):
        assert sorted(order[epoch * steps : (epoch + 1) * steps]) == list(range(steps))
    shorter = max(total - cut, 1)
    assert step_order([0, 3 * steps], 3, shorter, seed) == order[:shorter]
