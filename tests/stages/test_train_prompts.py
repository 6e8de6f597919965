"""Where completions end that a model writes while it trains."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.graph import WIRING
from stages import templates as named_templates
from stages.errors import UserError
from stages.objectives.grpo import GrpoOptions
from stages.rewards import RewardChoice
from stages.runtime import Runtime
from stages.stage import Work
from stages.tables import read_table
from stages.train import TrainConfig, prompts, vllm_engine
from tests.stages import test_train_online
from tests.stages.chatting import TEMPLATE, chat_model
from tests.stages.packed import Packed

__all__ = ["chat_model"]


def templates(folder: Path, text: str = TEMPLATE) -> Path:
    """As convert writes down what it used."""
    (folder / "templates/asked").mkdir(parents=True)
    (folder / "templates/asked/chat_template.jinja").write_text(text)
    return folder / "templates"


def ends_otherwise(model: Path, folder: Path) -> Path:
    """A model whose texts end in another token than a turn of the template, and that has no template itself."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_start|>"
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_completion_ends_where_a_turn_of_the_template_does(chat_model: Path, tmp_path: Path) -> None:
    """Of the template that convert used, which need not be the model's. TRL knows one end, the tokenizer's."""
    folder = ends_otherwise(chat_model, tmp_path / "model")
    found = prompts.plain_tokenizer(folder, templates(tmp_path / "chatml"))
    assert (found.eos_token, found.pad_token) == ("<|im_end|>", "<|im_start|>")
    assert prompts.plain_tokenizer(folder, None).eos_token == "<|im_start|>"
    others = templates(tmp_path / "other", TEMPLATE.replace("<|im_end|>", "<|im_start|>"))
    assert prompts.plain_tokenizer(chat_model, others).eos_token == "<|im_start|>"
    options = GrpoOptions.model_validate(
        {"rewards": {"short": {"reward": "length", "options": {"most": 8}}}, "vllm": {}}
    )
    told = vllm_engine.arguments(options, [{"prompt": "hi"}], found, Runtime())
    assert told["generation_kwargs"] == {"stop_token_ids": [found.eos_token_id]}, "which it does not read there"


def test_the_end_of_a_turn_is_no_text_of_a_completion_special_or_not(chat_model: Path, tmp_path: Path) -> None:
    folder = ends_otherwise(chat_model, tmp_path / "model")
    settings = json.loads((folder / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    found = prompts.plain_tokenizer(folder, templates(tmp_path / "chatml"))
    ids = found("cd<|im_end|>")["input_ids"]
    assert (ids[-1], found.decode(ids)) == (found.eos_token_id, "cd<|im_end|>")
    assert found.decode(ids, skip_special_tokens=True) == "cd"


def test_a_reward_that_knows_the_answer_does_not_look_at_the_reasoning(tiny_model: Path, tmp_path: Path) -> None:
    """Of a model that has learned what a template writes before a plain answer."""
    tokenizer, network = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    asked = "<|im_start|>user\nColour?<|im_end|>\n<|im_start|>assistant\n"
    said = "<think>\n\n</think>\n\nBlue.<|im_end|>"
    before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, asked + said))
    labels = torch.tensor([[-100] * len(before) + ids[len(before) :]])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(120):
        network(input_ids=torch.tensor([ids]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = shutil.copytree(tiny_model, tmp_path / "model")
    network.save_pretrained(model)
    test_train_online.prompts(tmp_path / "tokens", model, [asked], answer="Blue.")
    inputs = {
        "model": model,
        "tokens": tmp_path / "tokens",
        "plan": Packed(tmp_path / "tokens", tmp_path / "plan").output,
        "templates": templates(tmp_path, named_templates.find("qwen3").text),
    }
    form = {"reward": "regex", "options": {"pattern": "<think>.*</think>.*", "whole": True}}
    rewards = {"right": {"reward": "exact_match"}, "form": form}
    config = test_train_online.recipe(
        tmp_path, steps=1, rewards=rewards, max_new_tokens=len(ids), group_size=4, prompts_per_step=1
    )
    output, _ = test_train_online.train(tmp_path, inputs, config)
    rollouts = read_table(output / "rollouts.arrow").to_pylist()
    assert {row["completion"] for row in rollouts} == {"<think>\n\n</think>\n\nBlue."}
    assert all(dict(row["rewards"]) == {"right": 1.0, "form": 1.0} for row in rollouts)


@pytest.mark.parametrize("objective", ["grpo", "rloo", "gdpo", "ebft", "on_policy_distillation", "sft"])
def test_whatever_writes_completions_is_told_the_template(objective: str) -> None:
    config = TrainConfig.model_construct(objective=objective)
    assert WIRING["train"]["templates"].asked(config) == (objective != "sft")


def test_a_column_that_is_called_prompt_reaches_the_rewards(tiny_model: Path, tmp_path: Path) -> None:
    """Where another one was asked (`fields: {prompt: question}`)."""
    test_train_online.prompts(tmp_path / "tokens", tiny_model, ["say one\n"], prompt="the whole of it")
    given = {
        "model": tiny_model,
        "tokens": tmp_path / "tokens",
        "plan": Packed(tmp_path / "tokens", tmp_path / "p").output,
    }
    tokenizer = prompts.plain_tokenizer(tiny_model, None)
    (row,) = prompts.read(given, Work(tmp_path / "work", Runtime()), tokenizer, ("prompt",), {}, 8)
    assert json.loads(row["columns"]) == {"answer": "x", "prompt": "the whole of it"}


def test_a_column_that_a_reward_reads_must_hold_something(tiny_model: Path, tmp_path: Path) -> None:
    """Else no completion could be worth anything, or one that says `None`."""
    test_train_online.prompts(tmp_path / "tokens", tiny_model, ["say one\n"], answer=None, level=1)
    plan = Packed(tmp_path / "tokens", tmp_path / "p").output
    given = {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": plan}
    tokenizer = prompts.plain_tokenizer(tiny_model, None)
    right = {"right": RewardChoice(reward="exact_match")}
    with pytest.raises(UserError, match=r"the reward right reads the column 'answer'; a prompt has level: 'say one"):
        prompts.read(given, Work(tmp_path / "work", Runtime()), tokenizer, ("prompt",), right, 8)


def test_in_training_the_model_is_not_asked_beyond_the_end_of_its_turn(tiny_model: Path, tmp_path: Path) -> None:
    folder = ends_otherwise(tiny_model, tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(folder)
    network.generation_config.eos_token_id = network.config.eos_token_id = 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = torch.tensor(tokenizer([f"say {word}\nok<|im_end|>and on and on" for word in ("one", "two")])["input_ids"])
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(80):
        network(said, labels=said).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)
    test_train_online.prompts(tmp_path / "tokens", folder, ["say one\n", "say two\n"])
    plan = Packed(tmp_path / "tokens", tmp_path / "plan").output
    given: dict[str, Any] = {"model": folder, "tokens": tmp_path / "tokens", "plan": plan}
    for name, more, ended in (("with", {"templates": templates(tmp_path)}, True), ("without", {}, False)):
        short = {"short": {"reward": "length", "options": {"most": 8}}}
        config = test_train_online.recipe(tmp_path, steps=1, rewards=short, temperature=0.01)
        output, _ = test_train_online.train(tmp_path / name, {**given, **more}, config)
        (step,) = test_train_online.figures(output)
        written = set(read_table(output / "rollouts.arrow")["completion"].to_pylist())
        assert (written == {"ok"}) == ended and step["cut_off"] == (0.0 if ended else 1.0)
