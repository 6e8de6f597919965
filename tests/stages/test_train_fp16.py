"""fp16's scaler of gradients, on the CPU in place of the GPU's: what it skips is no spike, and checkpoints hold it."""

import json
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from stages.identity import tree_of
from stages.stage import Facts
from stages.train import TrainConfig, checks, schedules
from stages.train.policy import MOST_SKIPPED, Watch
from tests.stages.test_train_policy import poisoned
from tests.stages.test_train_resume import prepare, run, warn

__all__ = ["poisoned"]

CONFIG = {"precision": "fp16", "max_steps": 10}


def scaled(monkeypatch: pytest.MonkeyPatch, start: float, grows_after: int = 2000) -> list[float]:
    """Have training scale gradients on the CPU, from a scale on; returns the scale of every step taken or skipped."""
    scales: list[float] = []

    class Scaler(torch.amp.GradScaler):
        def update(self, new_scale: Any = None) -> None:
            scales.append(self.get_scale())
            super().update(new_scale)

    begin = accelerate.Accelerator.__init__

    def init(self: Any, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        if self.state.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = Scaler("cpu", init_scale=start, growth_interval=grows_after)

    monkeypatch.setattr(accelerate.Accelerator, "__init__", init)
    monkeypatch.setattr(checks, "refuse_device", lambda *_: None)
    return scales


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "output/metrics.jsonl").read_text().splitlines()]


def test_skipped_steps_are_counted_and_a_stopped_training_goes_on_at_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = prepare(tmp_path)
    scales = scaled(monkeypatch, 2.0**24, grows_after=2)
    facts: Facts = run(tmp_path / "whole", inputs, "full", config=CONFIG)
    unbroken = scales.copy()
    found = lines(tmp_path / "whole")
    skipped = [line["skipped"] for line in found]
    assert skipped[0] == 1 and found[0]["grad_norm"] == 0
    assert 0 < sum(skipped) == facts["skipped_steps"] < 10
    assert all(line["grad_norm"] > 0 for line in found if not line["skipped"])
    assert len(set(unbroken)) > 2
    config = TrainConfig.model_validate({**CONFIG, "method": "full"})
    rate = schedules.multiplier(config, 10)
    expected = [rate(step) / rate(9) for step in range(10)]
    assert [line["learning_rate"] / found[9]["learning_rate"] for line in found] == pytest.approx(expected)

    scales.clear()
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", inputs, "full", warn, config=CONFIG)
    assert 0 < run(tmp_path / "parts", inputs, "full", config=CONFIG)["resumed_at_step"] < 10
    assert scales == unbroken
    assert tree_of(tmp_path / "parts/output") == tree_of(tmp_path / "whole/output")


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", pytest.param("adamw_16bit", marks=pytest.mark.full)])
def test_a_step_is_left_out_and_the_others_are_clipped_by_their_own_gradients(
    tmp_path: Path, poisoned: dict[str, Path], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    scaled(monkeypatch, 1024.0)
    config = {"optimizer": optimizer, "on_spike": "rollback", "epochs": 1, "learning_rate": 1e-3}
    facts = run(tmp_path / "half", poisoned, "lora", config={**config, "precision": "fp16"}, save_seconds=1e-9)
    assert [entry["step"] for entry in facts["left_out_steps"]] == [3]
    found = lines(tmp_path / "half")
    assert [line["step"] for line in found] == [1, 2, 4, 5, 6]
    run(tmp_path / "single", poisoned, "lora", config={**config, "precision": "fp32"}, save_seconds=1e-9)
    for name in ("loss", "grad_norm", "learning_rate"):
        wanted = [line[name] for line in lines(tmp_path / "single")]
        assert [line[name] for line in found] == pytest.approx(wanted, rel=2e-2)


def test_gradients_that_no_scale_fits_are_a_spike_at_last() -> None:
    watch = Watch()
    step = {"loss": 1.0, "grad_norm": 0.0, "skipped": 1}
    assert [watch.look(step) for _ in range(MOST_SKIPPED)] == [None] * MOST_SKIPPED
    assert watch.look({**step, "grad_norm": 1.0, "skipped": 0}) is None
    assert [watch.look(step) for _ in range(MOST_SKIPPED)] == [None] * MOST_SKIPPED
    found = watch.look(step)
    assert found is not None and not found.finite
    assert len(watch.past["grad_norm"]) == 1, "what was skipped says nothing of what is usual"
