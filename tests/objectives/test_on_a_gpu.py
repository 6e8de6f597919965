"""Every objective on a GPU: in float32 the losses of a CPU, in bfloat16 near them, from a reference scored there."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.objectives import names
from stages.runtime import Runtime
from stages.score import STAGE as SCORE
from stages.score import ScoreConfig
from stages.stage import Work
from stages.train import STAGE as TRAIN
from stages.train import TrainConfig
from tests.objectives import test_kto, test_reward_models
from tests.stages import test_train_online
from tests.stages.packed import Packed, turns

PAIRS, ONLINE = ("cpo", "dpo", "orpo", "reward", "simpo"), ("ebft", "gdpo", "grpo", "on_policy_distillation", "rloo")
KINDS = {
    **dict.fromkeys(PAIRS, test_reward_models.pairs),
    "process_reward": test_reward_models.solutions,
    "kto": test_kto.judged,
}
SCORED = {"dpo": None, "kto": None, "distillation": 5}
"""What is scored before: of each token its own log-probability, or of so many."""


def train(folder: Path, inputs: dict[str, Path], device: str, **config: Any) -> list[float]:
    """The losses; what the model before training or a teacher says is scored on the same device."""
    given = dict(inputs)
    objective = config["objective"]
    if objective in SCORED:
        place = next(path.parent for path in inputs["tokens"].glob("*/00000/tokens.arrow") if "kept" not in path.parts)
        scored = folder / "reference" / place.relative_to(inputs["tokens"])
        scored.mkdir(parents=True)
        how = ScoreConfig.model_validate({"precision": config["precision"], "top_k": SCORED[objective]})
        work = Work(folder / "scoring", Runtime.model_validate({"device": device}))
        scorer = {"model": inputs["model"], "tokens": place}
        if objective == "distillation":
            scorer |= {"tokenizer": inputs["model"], "model": teacher(inputs["model"], folder / "teacher")}
        SCORE.run(how, scorer, scored, work)
        given["reference"] = folder / "reference"
    (folder / "output").mkdir(parents=True, exist_ok=True)
    work = Work(folder / "work", Runtime.model_validate({"device": device, "workers": 1}))
    settings = {"learning_rate": 1e-3, "max_steps": 6, "warmup": 0, **config}
    if config["method"] == "lora":
        settings["lora"] = {"rank": 8}
    TRAIN.run(TrainConfig.model_validate(settings), given, folder / "output", work)
    lines = (folder / "output/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def teacher(student: Path, folder: Path) -> Path:
    """The same model with other weights."""
    shutil.copytree(student, folder)
    (weights,) = folder.glob("*.safetensors")
    random = torch.Generator().manual_seed(2)
    moved = {name: w + 0.15 * torch.randn(w.shape, generator=random) for name, w in load_file(weights).items()}
    save_file(moved, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("objective", sorted({*KINDS, "distillation", "sft"}))
def test_a_gpu_gives_the_losses_of_a_cpu(tmp_path: Path, tiny_model: Path, objective: str, method: str) -> None:
    KINDS.get(objective, conversations)(tmp_path / "tokens")
    packed = Packed(tmp_path / "tokens", tmp_path / "plan", sequence_length=128, global_batch=4, decontaminate=0.0)
    inputs = {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": packed.output}
    config = {"objective": objective, "method": method}
    exact = train(tmp_path / "cpu", inputs, "cpu", precision="fp32", **config)
    assert train(tmp_path / "fp32", inputs, "cuda", precision="fp32", **config) == pytest.approx(exact, rel=2e-3)
    assert train(tmp_path / "bf16", inputs, "cuda", precision="bf16", **config) == pytest.approx(exact, rel=0.1)


def conversations(tokens: Path) -> None:
    """Answers of one kind to one kind of question."""
    random = np.random.default_rng(3)
    made = []
    for number in range(60):
        answer = random.integers(60, 130, int(random.integers(3, 9))).tolist()
        made.append(
            {
                "row": number,
                "ids": [30, 31, int(random.integers(60, 200)), 32, 33, 34, *answer, 35],
                "spans": turns(("user", 1), ("assistant", len(answer))),
                "identity": number.to_bytes(8, "big") * 2,
                "extra": "",
            }
        )
    test_reward_models.put(tokens, "conversation", made)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("objective", ONLINE)
def test_completions_are_made_and_judged_on_a_gpu(
    tmp_path: Path, tiny_model: Path, objective: str, method: str
) -> None:
    test_train_online.prompts(tmp_path / "tokens", tiny_model, [f"say {word}\n" for word in ("one", "two", "three")])
    packed = Packed(tmp_path / "tokens", tmp_path / "plan")
    inputs = {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": packed.output}
    more: dict[str, Any] = {"method": method, "precision": "bf16"}
    if method == "lora":
        more["lora"] = {"rank": 4}
    config = test_train_online.recipe(tmp_path, objective, 3) | more
    if objective == "rloo":
        config["objective_options"] |= {"beta": 0.0}
    if objective == "ebft":
        config["objective_options"] = {"group_size": 8, "prompts_per_step": 2}
    if objective == "gdpo":
        config["objective_options"]["rewards"]["short"] = {"reward": "length", "options": {"most": 8}}
    if objective == "on_policy_distillation":
        config["objective_options"] = {"prompts_per_step": 16, "max_new_tokens": 12}
        inputs["teacher"] = teacher(tiny_model, tmp_path / "teacher")
    output, facts = test_train_online.train(tmp_path, inputs, config, device="cuda", allow_code=True)
    assert facts["completions"] == 3 * 2 * 8
    assert (output / "rollouts.arrow").exists()


def test_every_objective_is_here() -> None:
    assert {*KINDS, *ONLINE, "distillation", "sft"} == set(names())
