"""Energy-based fine-tuning: rewards are the paper's, found with the model before training, and features come nearer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stages.errors import UserError
from stages.objectives.ebft import EbftOptions
from stages.tables import read_table
from stages.train import Lora, TrainConfig, adapters
from stages.train.features import Frozen, anchored, matching
from tests.stages.packed import Packed
from tests.stages.test_train_online import figures, prompts, train

Floats = NDArray[np.float64]


def plainly(written: Floats, wanted: Floats, diversity: float, whiten: bool) -> list[float]:
    """One group's rewards, a number at a time. `written` [group, width], `wanted` [width]."""
    size = len(written)
    copies = np.stack([wanted] * size)
    if whiten:
        values, vectors = np.linalg.eigh(written @ written.T)
        map_ = vectors @ np.diag([value**-0.5 if value > 1e-9 else 0.0 for value in values]) @ vectors.T
        written, copies = map_ @ written, map_ @ copies
    else:
        written = np.stack([row / np.linalg.norm(row) for row in written])
    rewards = []
    for j in range(size):
        near = written[j] @ copies[j] / np.linalg.norm(written[j]) / np.linalg.norm(copies[j])
        others = [written[j] @ written[i] for i in range(size) if i != j]
        rewards.append(2 * near - 2 * diversity * sum(others) / len(others))
    return [float(reward) for reward in rewards]


@pytest.mark.parametrize("whiten", [True, False])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), group=st.integers(2, 6), diversity=st.floats(0, 2))
def test_rewards_are_those_of_the_formula(whiten: bool, seed: int, group: int, diversity: float) -> None:
    chance = np.random.default_rng(seed)
    written, wanted = chance.normal(size=(3, group, 24)), chance.normal(size=(3, 24))
    written[1, 0] = written[1, -1]  # two that are the same
    found = matching(torch.from_numpy(written), torch.from_numpy(wanted), diversity, whiten)
    expected = [plainly(*place, diversity, whiten) for place in zip(written, wanted, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("whiten", [True, False])
def test_continuations_that_are_all_the_same_are_worth_the_same(whiten: bool) -> None:
    one, wanted = torch.randn(24), torch.randn(1, 24)
    found = matching(one.expand(1, 4, 24).contiguous(), wanted, 1.0, whiten)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, found[:, :1].expand_as(found), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_features_are_the_models_before_training(tmp_path: Path, tiny_model: Path, method: str) -> None:
    described = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=8)
    before = AutoModelForCausalLM.from_config(described)
    before.save_pretrained(tmp_path)
    trained: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if method == "lora":
        trained = adapters.adapt(trained, Lora.model_validate({"rank": 4, "dropout": 0.5}), tmp_path)
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape)
    texts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11], [5, 6, 7]]
    found = Frozen(trained.train(), tmp_path, "cpu").features(texts)
    for row, text in zip(found, texts, strict=True):  # alone and without padding
        states = before.eval()(torch.tensor([text]), output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer][0, -1] for layer in (2, 4, 6)])
        torch.testing.assert_close(row, expected.detach(), atol=1e-5, rtol=1e-4)
    assert torch.equal(found[0], found[3]), "equal texts are the same to the last bit, as whitening needs"
    assert trained.training


def test_the_model_goes_on_from_every_few_tokens_of_the_reference(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    answer = "one two three four five six"
    rows = [{"prompt": "say it\n", "columns": json.dumps({"answer": answer, "level": 1})}]
    options = EbftOptions(stride=2, max_new_tokens=3)
    made, left_out = anchored(rows, tokenizer, options, 10_000, seed=0)
    whole, begin = tokenizer(answer)["input_ids"], tokenizer("say it\n")["input_ids"]
    assert len(made) + left_out == -(-len(whole) // 2) and len(made) > 2
    for row in made:
        at = len(tokenizer(row["prompt"])["input_ids"]) - len(begin)
        assert tokenizer(row["prompt"])["input_ids"] == begin + whole[:at] and at % 2 == 0
        assert row["rest"] == whole[at : at + 3] and json.loads(row["columns"])["level"] == 1
    again, _ = anchored(rows, tokenizer, options, 10_000, seed=1)
    assert again != made and sorted(map(str, again)) == sorted(map(str, made))
    _, more = anchored(rows, tokenizer, options, len(begin) + len(whole), seed=0)
    assert more > left_out, "what is too long for the model is left out, and counted"


def test_a_control_token_in_a_reference_is_refused(tiny_model: Path) -> None:
    row = {"prompt": "say it\n", "columns": json.dumps({"answer": "one<|im_end|>two"})}
    with pytest.raises(UserError, match="holds the text of a control token"):
        anchored([row], AutoTokenizer.from_pretrained(tiny_model), EbftOptions(), 256, seed=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    ("objective", "options"), [("ebft", {}), ("rloo", {"rewards": {"right": {"reward": "exact_match"}}})]
)
def test_a_start_that_changes_the_weights_is_refused(init: str, objective: str, options: dict[str, Any]) -> None:
    """The model before training is looked for under the adapter, and is not there. rloo has a `beta` by default."""
    with pytest.raises(ValueError, match="looks for the model before training under the"):
        TrainConfig.model_validate({"objective": objective, "objective_options": options, "lora": {"init": init}})


@pytest.mark.parametrize("columns", [{}, {"answer": None}, {"answer": 5}, {"answer": ""}])
def test_a_row_without_a_reference_is_told(tiny_model: Path, columns: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(UserError, match=r"reference: expected a text in the column 'answer'.*'say one"):
        anchored([{"prompt": "say one\n", "columns": json.dumps(columns)}], tokenizer, EbftOptions(), 256, seed=0)


@pytest.mark.full
@pytest.mark.parametrize("whiten", [True, False])
def test_features_come_nearer_to_the_references(tmp_path: Path, tiny_model: Path, whiten: bool) -> None:
    asked = [f"say {word}\n" for word in ("one", "two", "three", "four")]
    prompts(tmp_path / "tokens", tiny_model, asked, answer="abcabcabcabc")
    plan = Packed(tmp_path / "tokens", tmp_path / "plan").output
    inputs = {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": plan}
    sampled = {"group_size": 8, "prompts_per_step": 4, "max_new_tokens": 6, "stride": 6}
    config = {
        "objective": "ebft",
        "objective_options": {**sampled, "whiten": whiten},
        "method": "full",
        "learning_rate": 1e-2,
        "precision": "fp32",
        "schedule": "constant",
        "max_steps": 40,
    }
    output, facts = train(tmp_path, inputs, config)
    told = [step["feature_loss"] for step in figures(output)]
    assert sum(told[-10:]) < 0.95 * sum(told[:10])
    assert told[0] == facts["first_feature_loss"] and told[-1] == facts["last_feature_loss"]
    rows = read_table(output / "rollouts.arrow").to_pylist()
    assert len(rows) == facts["completions"] == 40 * 4 * 8
    assert {name for row in rows for name, _ in row["rewards"]} == {"features"}
