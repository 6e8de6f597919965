"""Completions that vLLM writes: with the weights of the moment, kept like all others, refused where it cannot be."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.objectives.grpo import VllmChoice
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.tables import read_table
from stages.train import STAGE, TrainConfig
from tests.stages.packed import Packed
from tests.stages.test_train_online import figures, prompts, recipe


def given(folder: Path, model: Path) -> dict[str, Path]:
    prompts(folder / "tokens", model, [f"say {word}\n" for word in ("one", "two", "three", "four")])
    return {"model": model, "tokens": folder / "tokens", "plan": Packed(folder / "tokens", folder / "plan").output}


def train(folder: Path, inputs: dict[str, Path], config: dict[str, Any], **runtime: Any) -> tuple[Path, Facts]:
    output = folder / "output"
    output.mkdir(parents=True)
    work = Work(folder / "work", Runtime.model_validate({"workers": 1, "allow_code": True, **runtime}))
    return output, STAGE.run(TrainConfig.model_validate(config), inputs, output, work)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_where_it_is_not_installed_says_how_to(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"pip install 'regrow\[vllm\]'"):
        train(tmp_path, given(tmp_path, tiny_model), recipe(tmp_path, vllm={}), device="cpu")


def test_on_a_cpu_it_is_refused(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there/vllm").mkdir(parents=True)
    (tmp_path / "there/vllm/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "there")
    with pytest.raises(UserError, match="needs a GPU"):
        train(tmp_path, given(tmp_path, tiny_model), recipe(tmp_path, vllm={}), device="cpu")


@pytest.mark.parametrize("more", [{"memory": 0.5}, {"sleep": True}])
def test_what_a_server_decides_is_refused_here(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="set where the server is started"):
        VllmChoice.model_validate({"mode": "server", **more})


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Random weights in a shape that vLLM's kernels take."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def judged(output: Path, facts: Facts, difference: float | None = 0.05) -> None:
    """What holds however vLLM is reached: the reward goes up, so it was told the new weights, and they agree, where
    TRL's trainer says by how much."""
    told = figures(output)
    rewards, quarter = [step["reward"] for step in told], len(told) // 4
    assert sum(rewards[-quarter:]) > 1.15 * sum(rewards[:quarter])
    if difference is not None:
        assert all(step["vllm_difference"] < difference for step in told)
    assert len(read_table(output / "rollouts.arrow")) == facts["completions"] == len(told) * 2 * 8


def asked(folder: Path, objective: str, method: str, **vllm: Any) -> dict[str, Any]:
    """A recipe that learns in seconds: an adapter of this small model needs more steps than all its weights."""
    if method == "full":
        return recipe(folder, objective, vllm=vllm) | {"precision": "bf16", "learning_rate": 1e-3}
    config = recipe(folder, objective, steps=40, vllm=vllm) | {"precision": "bf16", "learning_rate": 1e-2}
    return config | {"method": "lora", "lora": {"rank": 8, "alpha": 16}}


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["grpo", "rloo"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_colocated_it_writes_with_the_weights_of_the_moment(
    tmp_path: Path, small_model: Path, objective: str, method: str
) -> None:
    """In a process of its own, as a training is: vLLM keeps its share of the memory until the process ends."""
    pytest.importorskip("vllm")
    config = asked(tmp_path, objective, method, memory=0.1)
    paths = {name: str(path) for name, path in given(tmp_path, small_model).items()}
    (tmp_path / "asked.json").write_text(json.dumps([str(tmp_path / "made"), paths, config]))
    subprocess.run([sys.executable, "-m", "tests.stages.test_train_vllm", str(tmp_path / "asked.json")], check=True)
    facts = json.loads((tmp_path / "made/facts.json").read_text())
    judged(tmp_path / "made/output", facts, None if objective == "rloo" else 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_is_told_the_weights_of_the_moment(
    tmp_path: Path, small_model: Path, method: str, asynchronous: bool
) -> None:
    """On a second GPU, as NCCL does not send from a GPU to itself."""
    import torch

    pytest.importorskip("vllm")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    started = ["serve", str(small_model), "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "512"]
    told = ["--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs"]
    more = ["--max-logprobs", "-1", "--gpu-memory-utilization", "0.1", "--enforce-eager"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1", "VLLM_SERVER_DEV_MODE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *started, *told, *more]
    server = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
        config = asked(tmp_path, "grpo", method, mode="server", asynchronous=asynchronous)
        paths = {name: str(path) for name, path in given(tmp_path, small_model).items()}
        (tmp_path / "asked.json").write_text(json.dumps([str(tmp_path / "made"), paths, config]))
        subprocess.run(
            [sys.executable, "-m", "tests.stages.test_train_vllm", str(tmp_path / "asked.json")],
            check=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "0", "REGROW_VLLM_URL": address},
        )
        facts = json.loads((tmp_path / "made/facts.json").read_text())
        judged(tmp_path / "made/output", facts, 0.5 if asynchronous else 0.05)  # a step's learning lies between them
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    made, told, asked_for = json.loads(Path(sys.argv[1]).read_text())
    url = {"vllm_url": os.environ["REGROW_VLLM_URL"]} if "REGROW_VLLM_URL" in os.environ else {}
    _, facts = train(Path(made), {name: Path(path) for name, path in told.items()}, asked_for, **url)
    (Path(made) / "facts.json").write_text(json.dumps(facts))
