"""Whole trainings whose completions another writes, as vLLM does: told the weights of the moment, asked in time.

vLLM itself needs a GPU (test_train_vllm.py). Here a second copy of the model writes in its place, behind TRL's trainer.
"""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.runtime import Runtime
from stages.stage import Work
from stages.tables import read_table
from stages.train import STAGE, TrainConfig
from tests.stages.test_train_online import figures, recipe, train
from tests.stages.test_train_vllm import given


class Writer:
    """What `trl.generation.vllm_generation.VLLMGeneration` is to a trainer: knows no weights but those it was told."""

    folder: Path

    def __init__(self, *, model: Any, processing_class: Any, max_completion_length: int, **_: Any) -> None:
        self.model, self.end, self.most = model, processing_class.eos_token_id, max_completion_length
        self.network = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.chance = torch.Generator().manual_seed(0)
        self.vllm_client = SimpleNamespace(
            get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}}
        )

    @torch.no_grad()
    def sync_weights(self) -> None:
        told, own = dict(self.model.named_parameters()), dict(self.network.named_parameters())
        assert set(told) == set(own)
        for name, weight in told.items():
            own[name].copy_(weight)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any = None) -> Any:
        written: list[list[int]] = []
        chances: list[list[list[float]]] = []
        for prompt in prompts[::num_generations]:
            ids = torch.tensor([prompt] * num_generations)
            told = torch.zeros(num_generations, 0)
            for _ in range(self.most):
                scores = self.network(ids).logits[:, -1].float().log_softmax(-1)
                drawn = torch.multinomial(scores.exp(), 1, generator=self.chance)
                ids, told = torch.cat([ids, drawn], 1), torch.cat([told, scores.gather(1, drawn)], 1)
            for row, likely in zip(ids[:, len(prompt) :].tolist(), told.tolist(), strict=True):
                length = row.index(self.end) + 1 if self.end in row else self.most
                written.append(row[:length])
                chances.append([[one] for one in likely[:length]])
        assert len(written) == len(prompts)
        return prompts, written, chances, None


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Writer)
    monkeypatch.setattr("stages.train.vllm_engine.refuse", lambda device: None)
    monkeypatch.setattr(Writer, "folder", tiny_model, raising=False)
    return given(tmp_path, tiny_model)


def asked(folder: Path, asynchronous: bool, **more: Any) -> dict[str, Any]:
    return recipe(folder, vllm={"mode": "server", "asynchronous": asynchronous}, **more)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_it_learns_from_what_the_weights_of_the_moment_wrote_or_those_of_a_step_ago(
    tmp_path: Path, inputs: dict[str, Path], method: str, asynchronous: bool
) -> None:
    config = asked(tmp_path, asynchronous) | {"method": method}
    if method == "lora":
        config |= {"lora": {"rank": 8, "alpha": 16}}
    output, facts = train(tmp_path, inputs, config, allow_code=True, vllm_url="http://localhost:8000")
    told = figures(output)
    rewards, differences = ([step[name] for step in told] for name in ("reward", "vllm_difference"))
    if method == "full":  # an adapter of random weights needs more steps than this
        assert sum(rewards[-4:]) > 1.3 * sum(rewards[:4])
    assert differences[0] < 1e-5
    assert all(one > 1e-3 if asynchronous else one < 1e-5 for one in differences[1:])
    assert facts["completions"] == 12 * 2 * 8


@pytest.mark.parametrize("iterations", [1, 2])
def test_asynchronous_a_suspended_run_goes_on_at_the_prompts_it_had_come_to(
    tmp_path: Path, inputs: dict[str, Path], iterations: int
) -> None:
    config = asked(tmp_path, True, steps=6, iterations=iterations)
    runtime = {"device": "cpu", "workers": 1, "allow_code": True, "vllm_url": "http://localhost:8000"}
    whole, _ = train(tmp_path / "whole", inputs, config, **runtime)

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if done == 2 and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "parts"
    (folder / "output").mkdir(parents=True)
    work = Work(folder / "work", Runtime.model_validate(runtime), tell=tell)
    with pytest.raises(SystemExit):
        STAGE.run(TrainConfig.model_validate(config), inputs, folder / "output", work)
    shutil.rmtree(folder / "output")
    parts, facts = train(folder, inputs, config, **runtime)
    assert facts["resumed_at_step"] == 2 + iterations
    asked_for = [[row["prompt"] for row in read_table(made / "rollouts.arrow").to_pylist()] for made in (whole, parts)]
    assert asked_for[0] == asked_for[1] and len(asked_for[0]) == 6 // iterations * 2 * 8
