"""Online objectives: rewards go up, rollouts are kept, a killed run goes on as it would have, mistakes are named."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from stages import objectives
from stages.errors import UserError
from stages.identity import tree_of
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.tables import read_table
from stages.train import STAGE, TrainConfig, online_trainer
from tests.stages.packed import Packed, turns
from tests.stages.tiny import save, write_tokens

OWN = """
from stages.rewards import Reward

def score(completion, row, options):
    if row["answer"] == "refuse" and completion:
        raise RuntimeError("cannot score this")
    return sum(character.isalpha() for character in completion) / max(1, len(completion))

REWARD = Reward(1, score)
"""

PICKY = """
from stages.rewards import Reward

def score(completion, row, options):
    if len(completion) % 2:
        raise RuntimeError("odd")
    return 0.0

REWARD = Reward(1, score)
"""


def prompts(folder: Path, model: Path, texts: list[str], **columns: Any) -> None:
    """A shard of prompts, tokenized with the model's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [
        {
            "row": number,
            "ids": (ids := tokenizer(text, add_special_tokens=False)["input_ids"]),
            "spans": turns(("user", len(ids) - 3)),
            "identity": number.to_bytes(8, "big") * 2,
            "extra": json.dumps({"answer": "x", **columns}),
        }
        for number, text in enumerate(texts)
    ]
    counts = {
        **write_tokens(folder / "asked/00000", len(tokenizer), rows, extra=True),
        "kind": "prompt",
        "rows": len(rows),
        "dropped": {},
        "source": "asked",
        "split": "train",
    }
    (folder / "asked/00000/counts.json").write_text(json.dumps(counts))


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path) -> dict[str, Path]:
    prompts(tmp_path / "tokens", tiny_model, [f"say {word}\n" for word in ("one", "two", "three", "four")])
    packed = Packed(tmp_path / "tokens", tmp_path / "plan")
    return {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": packed.output}


def train(folder: Path, inputs: dict[str, Path], config: dict[str, Any], **runtime: Any) -> tuple[Path, Facts]:
    output = folder / "output"
    output.mkdir(parents=True)
    work = Work(folder / "work", Runtime.model_validate({"device": "cpu", "workers": 1, **runtime}))
    return output, STAGE.run(TrainConfig.model_validate(config), inputs, output, work)


def recipe(tmp_path: Path, objective: str = "grpo", steps: int = 12, **options: Any) -> dict[str, Any]:
    path = tmp_path / "letters.py"
    path.write_text(OWN)
    settings = {"rewards": {"letters": {"reward": str(path)}}, "group_size": 8, "prompts_per_step": 2}
    return {
        "objective": objective,
        "objective_options": {**settings, "max_new_tokens": 12, **options},
        "learning_rate": 1e-2,
        "precision": "fp32",
        "max_steps": steps,
        "method": "full",
        "schedule": "constant",
    }


def figures(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["grpo", "gdpo", "rloo"])
def test_the_reward_goes_up_and_every_completion_is_kept(
    tmp_path: Path, inputs: dict[str, Path], objective: str
) -> None:
    options: dict[str, Any] = {"beta": 0.0, "normalize_advantages": True} if objective == "rloo" else {}
    if objective == "gdpo":
        letters = {"reward": str(tmp_path / "letters.py")}
        options = {
            "rewards": {"letters": letters, "short": {"reward": "length", "weight": 0.1, "options": {"most": 8}}}
        }
    output, facts = train(tmp_path, inputs, recipe(tmp_path, objective, **options), allow_code=True)
    rewards = [step["reward"] for step in figures(output)]
    assert sum(rewards[-4:]) > 1.3 * sum(rewards[:4])
    rollouts = read_table(output / "rollouts.arrow").to_pylist()
    assert len(rollouts) == facts["completions"] == 12 * 2 * 8
    assert [row["step"] for row in rollouts] == sorted(row["step"] for row in rollouts)
    for row in rollouts:
        letters = sum(character.isalpha() for character in row["completion"])
        assert dict(row["rewards"])["letters"] == pytest.approx(letters / max(1, len(row["completion"])))
        assert row["prompt"].startswith("say ")
    assert (output / "weights" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "own",
    [{"min_p": 0.999}, {"num_beams": 3, "do_sample": False}, {"suppress_tokens": [*range(67), *range(68, 258)]}, None],
    ids=["min_p", "beams", "suppressed", "no file"],
)
def test_what_a_folder_says_of_generating_shapes_no_completion_and_is_written_again(
    tmp_path: Path, inputs: dict[str, Path], own: dict[str, Any] | None
) -> None:
    def written(folder: Path, settings: dict[str, Any] | None) -> tuple[list[dict[str, Any]], Path]:
        shutil.copytree(inputs["model"], folder / "model")
        path = folder / "model/generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **(settings or {})}))
        if settings is None:
            path.unlink()
        output, _ = train(folder, {**inputs, "model": folder / "model"}, recipe(tmp_path, steps=1), allow_code=True)
        return read_table(output / "rollouts.arrow").to_pylist(), output / "weights/generation_config.json"

    plain, _ = written(tmp_path / "plain", {})
    rows, path = written(tmp_path / "own", own)
    assert rows == plain and len({row["completion"] for row in rows}) == 2 * 8
    before = tmp_path / "own/model/generation_config.json"
    assert path.exists() == before.exists() and (own is None or path.read_bytes() == before.read_bytes())


def test_what_writes_is_what_learns_without_dropout(tmp_path: Path, inputs: dict[str, Path]) -> None:
    def trained(share: float) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
        folder = tmp_path / f"dropout {share}"
        like_tiny(folder / "model", inputs["model"], "PhiConfig", embd_pdrop=share, resid_pdrop=share)
        config = recipe(tmp_path, steps=2, beta=0.1)
        output, _ = train(folder, {**inputs, "model": folder / "model"}, config, allow_code=True)
        return read_table(output / "rollouts.arrow").to_pylist(), figures(output)

    assert trained(0.5) == trained(0.0)


def test_an_adapter_in_float32_answers_through_weights_in_bfloat16(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.arithmetic.cpu_has_bf16", lambda: True)  # as on a GPU
    lora = {"method": "lora", "precision": "bf16", "lora": {"rank": 4}}
    _, facts = train(tmp_path, inputs, recipe(tmp_path, steps=2) | lora, allow_code=True)
    assert facts["precision"] == "bf16"
    assert facts["completions"] == 2 * 2 * 8


def test_the_adapter_alone_is_written_not_how_it_started(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """TRL keeps a copy of that beside it, for the divergence."""
    config = recipe(tmp_path, steps=2, beta=0.1) | {"method": "lora", "lora": {"rank": 4}}
    output, _ = train(tmp_path, inputs, config, allow_code=True)
    written = {path.name for path in (output / "adapter").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_reward_model_is_asked_by_its_name(tmp_path: Path, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from stages import heads

    judge = tmp_path / "models/kind"
    shutil.copytree(tiny_model, judge)
    heads.save({"weight": torch.randn(1, 32, generator=torch.Generator().manual_seed(4))}, tmp_path)
    heads.convert(judge, tmp_path / heads.HEAD)
    asked = [f"<|im_start|>user\nsay {word}<|im_end|>\n<|im_start|>assistant\n" for word in ("one", "two")]
    prompts(tmp_path / "tokens", tiny_model, asked)
    plan = Packed(tmp_path / "tokens", tmp_path / "plan").output
    given = {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": plan, "reward_models": judge.parent}
    config = recipe(
        tmp_path,
        steps=1,
        rewards={"kind": {"reward": "reward_model", "options": {"model": "kind"}}},
        group_size=2,
        reward_seconds=60,
    )
    output, facts = train(tmp_path, given, config)
    assert facts["unscored"] == {}
    model = AutoModelForSequenceClassification.from_pretrained(judge)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    for row in read_table(output / "rollouts.arrow").to_pylist():
        text = row["prompt"] + row["completion"] + "<|im_end|>\n"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = float(model.score(model.model(ids).last_hidden_state[0, -1]))
        assert dict(row["rewards"])["kind"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_run_that_was_suspended_goes_on_as_it_would_have(
    tmp_path: Path, inputs: dict[str, Path], iterations: int
) -> None:
    picky = tmp_path / "picky.py"
    picky.write_text(PICKY)
    rewards = {name: {"reward": str(tmp_path / f"{name}.py")} for name in ("letters", "picky")}
    config = recipe(tmp_path, steps=6, iterations=iterations, rewards=rewards, on_error="zero")
    whole, before = train(tmp_path / "whole", inputs, config, allow_code=True)

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if done == 2 and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "parts"
    (folder / "output").mkdir(parents=True)
    work = Work(folder / "work", Runtime(device="cpu", workers=1, allow_code=True), tell=tell)
    with pytest.raises(SystemExit) as stopped:
        STAGE.run(TrainConfig.model_validate(config), inputs, folder / "output", work)
    assert stopped.value.code == 75
    (folder / "output").rmdir()
    shutil.rmtree(folder / "work/rollouts")  # another machine has the checkpoints alone
    parts, facts = train(folder, inputs, config, allow_code=True)
    assert facts["resumed_at_step"] == 2 + iterations, "a batch of completions is trained on as often as it would be"
    assert tree_of(parts) == tree_of(whole)
    assert facts["completions"] == 6 // iterations * 2 * 8
    assert facts["unscored"] == before["unscored"] and before["unscored"]["picky"] > 0


def test_a_training_that_has_come_to_no_numbers_ends_and_leaves_nothing(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    # What no gradient reaches, such as a token that is not there, is divided by nothing.
    config = recipe(tmp_path, steps=1) | {"optimizer_options": {"eps": 0.0}}
    told = "weights are no numbers any more, at a gradient norm of .* after step 1"
    with pytest.raises(UserError, match=told):
        train(tmp_path, inputs, config, allow_code=True, save_seconds=1e-9)
    assert not any((tmp_path / "output").iterdir()) and not (tmp_path / "work/checkpoints").exists()


def test_reward_divergence_length_and_clipping_are_told_while_it_trains(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    told: list[dict[str, Any]] = []

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        told.extend([metrics] if "loss" in metrics else [])

    (tmp_path / "output").mkdir()
    work = Work(tmp_path / "work", Runtime(device="cpu", workers=1, allow_code=True), tell=tell)
    STAGE.run(TrainConfig.model_validate(recipe(tmp_path, steps=1, beta=0.1)), inputs, tmp_path / "output", work)
    (step,), (kept,) = told, figures(tmp_path / "output")
    shown = ("loss", "reward", "kl", "completion_length", "cut_off", "equal_groups", "clip_fraction", "grad_norm")
    assert {name: step[name] for name in shown} == {name: kept[name] for name in shown}


def test_a_full_disk_costs_the_checkpoint_and_is_told_and_training_goes_on(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    told: list[dict[str, Any]] = []

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        told.append(metrics)
        full = "loss" in metrics and not any("note" in each for each in told)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384 if full else most, most))

    work = Work(tmp_path / "work", Runtime(device="cpu", workers=1, allow_code=True, save_seconds=1e-9), tell=tell)
    (tmp_path / "output").mkdir()
    config = TrainConfig.model_validate(recipe(tmp_path, steps=3))
    try:
        facts: Any = STAGE.run(config, inputs, tmp_path / "output", work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert facts["notes"] == [each["note"] for each in told if "note" in each]
    assert facts["notes"][0].startswith("the checkpoint of step 1 was not written to ")
    assert [each["checkpoint"] for each in told if "checkpoint" in each] == ["2"], "a later one is written"
    assert facts["steps"] == 3 and facts["completions"] == 3 * 2 * 8


def test_a_schedule_free_run_writes_the_averaged_weights(tmp_path: Path, inputs: dict[str, Path]) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from stages.train import optimizers

    config = recipe(tmp_path) | {"optimizer": "schedule_free_adamw", "warmup": 0}
    train(tmp_path / "longer", inputs, {**config, "max_steps": 3}, allow_code=True, save_seconds=1e-9)
    output, _ = train(tmp_path / "run", inputs, {**config, "max_steps": 2}, allow_code=True)
    checkpoint = tmp_path / "longer/work/checkpoints/2"  # as the training goes on from there
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    optimizer: Any = optimizers.make(network, TrainConfig.model_validate(config))
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    training = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    optimizer.eval()
    written = load_file(output / "weights/model.safetensors")
    for name, weight in network.named_parameters():
        if name in written:
            torch.testing.assert_close(written[name], weight.detach(), rtol=1e-5, atol=1e-6)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(written[name], training[name], rtol=1e-3, atol=1e-4)


def test_a_prompt_is_asked_with_the_tokens_of_the_plan(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tokenizer puts before a text that is not rendered yet."""
    from transformers import LlamaForCausalLM

    beginning = shutil.copytree(tiny_model, tmp_path / "model")
    document = json.loads((beginning / "tokenizer.json").read_text())
    begin, text = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    named = {"<|im_start|>": {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}}
    template = {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text], "special_tokens": named}
    (beginning / "tokenizer.json").write_text(json.dumps({**document, "post_processor": template}))
    prompts(tmp_path / "tokens", beginning, ["<|im_start|>say one\n"])
    plan = Packed(tmp_path / "tokens", tmp_path / "plan").output
    asked: list[list[int]] = []
    generate = LlamaForCausalLM.generate

    def listening(self: Any, **given: Any) -> Any:
        asked.extend(given["input_ids"].tolist())
        return generate(self, **given)

    monkeypatch.setattr(LlamaForCausalLM, "generate", listening)
    inputs = {"model": beginning, "tokens": tmp_path / "tokens", "plan": plan}
    train(tmp_path, inputs, recipe(tmp_path, steps=1, prompts_per_step=1), allow_code=True)
    assert asked and all(ids[:2].count(0) == 1 for ids in asked)


def like_tiny(folder: Path, tiny_model: Path, config_name: str, **changes: Any) -> Path:
    """A model of another architecture with the tiny model's tokenizer."""
    sizes = {"vocab_size": 258, "num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    save(folder, config_name, **sizes, **changes)
    for path in (*tiny_model.glob("*token*"), *tiny_model.glob("chat_template*")):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
@pytest.mark.parametrize("kind", ["LlamaConfig", "MixtralConfig"])
def test_a_step_is_the_same_whatever_goes_in_at_once(
    tmp_path: Path, inputs: dict[str, Path], objective: str, kind: str
) -> None:
    """Some completions end early, and a mixture's tokens go to some experts more than to others."""
    from transformers import AutoModelForCausalLM

    folder = like_tiny(tmp_path / "model", inputs["model"], kind)
    network = AutoModelForCausalLM.from_pretrained(folder)
    network.lm_head.weight.data[network.config.eos_token_id] *= 5
    network.save_pretrained(folder)
    config = recipe(tmp_path, objective, steps=1, prompts_per_step=4, group_size=4)
    given = {**inputs, "model": folder}
    (one,), (four,) = (
        figures(train(tmp_path / str(at_once), given, config, allow_code=True, micro_batch=at_once)[0])
        for at_once in (1, 4)
    )
    assert one["completion_length"] == four["completion_length"] < 12
    assert one["loss"] == pytest.approx(four["loss"], abs=1e-6)
    assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)


def test_trackers_are_told_the_figures(tmp_path: Path, inputs: dict[str, Path]) -> None:
    pytest.importorskip("tensorboard")
    train(tmp_path, inputs, recipe(tmp_path, steps=1), allow_code=True, trackers="tensorboard", cache=tmp_path)
    assert any((tmp_path / "tensorboard").rglob("events.*"))


@pytest.mark.parametrize("objective", ["grpo", "gdpo", "rloo", "on_policy_distillation"])
def test_of_several_gpus_one_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    online = objectives.find(objective).online
    assert online is not None
    settings = {"output_dir": str(tmp_path), "bf16": False, "report_to": []}
    made = online_trainer.settings_of(online, settings)
    assert made.n_gpu == 1  # with more, TRL's trainers refuse to begin
    assert made.model_init_kwargs == {"device_map": {"": 0}}, "a reference model is where the model is"


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_it_trains_where_there_are_two_gpus(tmp_path: Path, inputs: dict[str, Path], objective: str) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    _, facts = train(tmp_path, inputs, recipe(tmp_path, objective, steps=2), allow_code=True, device="cuda")
    assert facts["completions"] == 2 * 2 * 8


def test_a_reward_that_fails_stops_the_run_or_counts_zero(tmp_path: Path, tiny_model: Path) -> None:
    prompts(tmp_path / "tokens", tiny_model, ["say one\n", "say two\n"], answer="refuse")
    inputs = {
        "model": tiny_model,
        "tokens": tmp_path / "tokens",
        "plan": Packed(tmp_path / "tokens", tmp_path / "plan").output,
    }
    with pytest.raises(
        UserError, match=r"the reward letters: RuntimeError: cannot score this \(line 6\), for the completion"
    ):
        train(tmp_path / "stop", inputs, recipe(tmp_path, steps=1), allow_code=True)
    output, facts = train(tmp_path / "zero", inputs, recipe(tmp_path, steps=1, on_error="zero"), allow_code=True)
    assert facts["unscored"]["letters"] > 0
    assert facts["equal_groups"] == 1.0, "all zero: nothing was learned, and that is said"
    assert figures(output)[0]["reward"] == 0.0
