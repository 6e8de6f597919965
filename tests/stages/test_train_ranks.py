"""Several ranks compute what one does: the same losses, checkpoints that either goes on from, one clear end."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import UserError
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.train import STAGE, TrainConfig
from tests.stages import tiny

CONFIG: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-2, "precision": "fp32", "lora": {"rank": 4}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five steps of eight sequences and one of three, so that ranks also get unlike hands."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = tiny.documents(43)
    return {"model": tiny.llama(folder / "model"), **tiny.plan(folder, rows, global_batch=8, packed=False)}


def train(
    folder: Path, inputs: dict[str, Path], tell: Any = None, method: str = "lora", **runtime: Any
) -> tuple[list[float], Facts]:
    output = folder / "output"
    output.mkdir(parents=True, exist_ok=True)
    settings = Runtime.model_validate({"device": "cpu", **runtime})
    work = Work(folder / "work", settings, **({"tell": tell} if tell else {}))
    facts = STAGE.run(TrainConfig.model_validate({**CONFIG, "method": method}), inputs, output, work)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], facts


def warn_after(step: int) -> Any:
    """A spot machine's warning, once a step's loss was told."""
    warned = []

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if "loss" in metrics and done >= step and not warned:
            warned.append(done)
            os.kill(os.getpid(), signal.SIGTERM)

    return tell


def test_two_ranks_of_four_are_one_of_eight_and_one_goes_on_where_two_were_stopped(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    alone, _ = train(tmp_path / "alone", inputs, micro_batch=1)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "shared", inputs, warn_after(4), ranks=2, micro_batch=4)
    assert stopped.value.code == 75
    found, facts = train(tmp_path / "shared", inputs, micro_batch=8)
    assert 4 <= facts["resumed_at_step"] < 18 == len(found)
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_sharded_model_goes_on_where_one_rank_was_stopped_and_back(
    tmp_path: Path, inputs: dict[str, Path], method: str
) -> None:
    alone, _ = train(tmp_path / "alone", inputs, method=method, micro_batch=1)
    with pytest.raises(SystemExit):
        train(tmp_path / "shared", inputs, warn_after(3), method=method, micro_batch=1)
    with pytest.raises(SystemExit):
        train(tmp_path / "shared", inputs, warn_after(8), method=method, ranks=2, micro_batch=1, shard="fsdp")
    found, facts = train(tmp_path / "shared", inputs, method=method, ranks=2, micro_batch=1, shard="fsdp")
    assert (facts["ranks"], facts["shard"]) == (2, "fsdp")
    assert facts["resumed_at_step"] >= 8
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.full
def test_what_one_rank_refuses_is_told_once_and_ends_all(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"^the model cannot be loaded"):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "config.json").write_text("{}")
        train(tmp_path, {**inputs, "model": tmp_path / "broken"}, ranks=2)


def test_more_ranks_than_sequences_a_step_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="9 ranks, but a step has only 8 sequences"):
        train(tmp_path, inputs, ranks=9)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("method", "shard"), [("lora", "none"), ("full", "none"), ("lora", "fsdp"), ("full", "fsdp")])
def test_two_gpus_compute_what_one_does_and_one_goes_on_where_they_stopped(
    tmp_path: Path, inputs: dict[str, Path], method: str, shard: str
) -> None:
    alone, _ = train(tmp_path / "alone", inputs, method=method, device="cuda", ranks=1, micro_batch=1)
    together, facts = train(tmp_path / "together", inputs, method=method, device="cuda", ranks=2, shard=shard)
    assert (facts["ranks"], facts["shard"]) == (2, shard)
    assert together == pytest.approx(alone, rel=1e-3)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "shared", inputs, warn_after(4), method=method, device="cuda", ranks=2, shard=shard)
    assert stopped.value.code == 75
    found, facts = train(tmp_path / "shared", inputs, method=method, device="cuda", ranks=1)
    assert 4 <= facts["resumed_at_step"] < 18 == len(found)
    assert found == pytest.approx(alone, rel=1e-3)
