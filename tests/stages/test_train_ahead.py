"""Whole trainings whose completions another writes, as vLLM does: told the weights of the moment, asked in time.

vLLM itself needs a GPU (test_train_vllm.py). Here a second copy of the model writes in its place, behind TRL's trainer.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flows.execute import execute
from flows.recipe import load
from flows.run import start
from stages.runtime import Runtime
from stages.stage import Work
from stages.store import open_store
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
            read, cache = torch.tensor([prompt] * num_generations), None
            ids, told = torch.zeros(num_generations, 0, dtype=torch.long), torch.zeros(num_generations, 0)
            for _ in range(self.most):
                out = self.network(read, past_key_values=cache, use_cache=True)
                scores, cache = out.logits[:, -1].float().log_softmax(-1), out.past_key_values
                read = torch.multinomial(scores.exp(), 1, generator=self.chance)
                ids, told = torch.cat([ids, read], 1), torch.cat([told, scores.gather(1, read)], 1)
            for row, likely in zip(ids.tolist(), told.tolist(), strict=True):
                length = row.index(self.end) + 1 if self.end in row else self.most
                written.append(row[:length])
                chances.append([[one] for one in likely[:length]])
        assert len(written) == len(prompts)
        return prompts, written, chances, None


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Lets a copy of a model write, once it is told which."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Writer)
    monkeypatch.setattr("stages.train.vllm_engine.refuse", lambda device: None)
    return lambda folder: monkeypatch.setattr(Writer, "folder", folder, raising=False)


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path, writes: Callable[[Path], None]) -> dict[str, Path]:
    writes(tiny_model)
    return given(tmp_path, tiny_model)


def asked(folder: Path, asynchronous: bool, **more: Any) -> dict[str, Any]:
    return recipe(folder, vllm={"mode": "server", "asynchronous": asynchronous}, **more)


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.full), "lora"])
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


@pytest.mark.parametrize("iterations", [pytest.param(1, marks=pytest.mark.full), 2])
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


@pytest.mark.full
@pytest.mark.timeout(3600)  # it took more than 40 minutes beside other programs
def test_a_step_ahead_a_real_model_learns_what_it_learns_in_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: Callable[[Path], None]
) -> None:
    """`configs/grpo.yaml`, in which a model learns to answer sums with a number alone, and which."""
    monkeypatch.chdir(Path(__file__).parents[2])
    runtime = Runtime.model_validate({"device": "cpu", "store": str(tmp_path / "store"), "cache": tmp_path / "cache"})
    run = start(load(Path("configs/grpo.yaml"), ()), runtime, open_store(runtime.store, runtime.cache))
    for stage in ("fetch", "convert", "tokenize", "pack"):
        execute(run, stage)
    inputs = {name: run.store.view(tree) for name, tree in run.inputs("train").items()}
    writes(inputs["model"])
    recipe = run.config("train").model_dump(mode="json")
    learned: dict[bool, list[float]] = {}
    for asynchronous in (False, True):
        vllm = {"mode": "server", "asynchronous": asynchronous}
        config = recipe | {"objective_options": recipe["objective_options"] | {"vllm": vllm}}
        output, _ = train(tmp_path / str(asynchronous), inputs, config, vllm_url="http://localhost:8000")
        learned[asynchronous] = [step["reward"] for step in figures(output)]
    told = {
        name: [round(sum(rewards[at : at + 10]) / 10, 3) for at in range(0, 40, 10)]
        for name, rewards in learned.items()
    }
    print(json.dumps(told))
    for first, *_, last in told.values():
        assert last > first + 0.2, told
    assert told[True][-1] > told[False][-2], told  # at most ten steps behind: single runs differ by a third
