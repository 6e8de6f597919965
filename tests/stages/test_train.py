"""train on a tiny model: what is learned, what is written, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.train import STAGE, TrainConfig
from tests.stages import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("train")
    return {"model": tiny.llama(folder / "model"), **tiny.plan(folder, tiny.documents())}


def train(folder: Path, inputs: dict[str, Path], config: dict[str, Any], **runtime: Any) -> tuple[Path, Facts]:
    output = folder / "output"
    output.mkdir(parents=True)
    work = Work(folder / "work", Runtime.model_validate({"device": "cpu", **runtime}))
    facts = STAGE.run(TrainConfig.model_validate(config), inputs, output, work)
    return output, facts


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_reduces_the_loss(tmp_path: Path, inputs: dict[str, Path], method: str) -> None:
    output, facts = train(tmp_path, inputs, {"method": method, "epochs": 5, "learning_rate": 1e-2})
    found = losses(output)
    assert len(found) == facts["steps"] == 15
    assert found[-1] < 0.7 * found[0]
