"""A loss that jumps: noted, stopped, or rolled back to what the training would have been without that step."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from stages import arithmetic
from stages.errors import UserError
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.train import STAGE, TrainConfig
from stages.train.policy import FEWEST, LEAST, SIGMAS, WINDOW, Watch
from stages.train.ranks import Group, Stopping
from stages.train.run import Attempt, attempt
from tests.stages import tiny

CONFIG: dict[str, Any] = {"precision": "fp32", "learning_rate": 1e-2, "epochs": 2, "lora": {"dropout": 0.1}}


@pytest.fixture
def poisoned(tmp_path: Path) -> dict[str, Path]:
    """Six rows, one a step; the third and (in the second epoch, somewhere) its repetition give no number."""
    model = tiny.llama(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.get_input_embeddings().weight[60] = float("nan")
    loaded.save_pretrained(model)
    rows = [[5 + 4 * n + i for i in range(4)] for n in range(6)]
    rows[2] = [58, 59, 60, 61]
    return {"model": model, **tiny.plan(tmp_path, rows, global_batch=1, packed=False)}


def train(folder: Path, inputs: dict[str, Path], config: dict[str, Any], **runtime: Any) -> tuple[list[Any], Facts]:
    output = folder / "output"
    output.mkdir(parents=True)
    work = Work(folder / "work", Runtime.model_validate({"device": "cpu", **runtime}))
    facts = STAGE.run(TrainConfig.model_validate(config), inputs, output, work)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], facts


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.full), "bf16"])
def test_rolling_back_gives_the_training_that_never_took_the_step(
    tmp_path: Path, poisoned: dict[str, Path], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "cpu_has_bf16", lambda: True)
    config = {**CONFIG, "precision": precision, "on_spike": "rollback"}
    found, facts = train(tmp_path / "rolled", poisoned, config, save_seconds=1e-9)
    left_out = [entry["step"] for entry in facts["left_out_steps"]]
    assert left_out[0] == 3 and len(left_out) == 2
    assert [entry["rows"] for entry in facts["left_out_steps"]] == ["chat/00000 row 13"] * 2
    assert len(facts["notes"]) == 2 and "loss is nan in step 3" in facts["notes"][0]

    output, work = tmp_path / "output", Work(tmp_path / "work", Runtime(device="cpu"))
    output.mkdir()
    never = Attempt("cpu", 1, "none", 12, left_out=tuple(step - 1 for step in left_out))
    attempt(TrainConfig.model_validate(config), poisoned, output, work, never, Group(), Stopping())
    oracle = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert found == oracle
    assert [line["step"] for line in found] == [step for step in range(1, 13) if step not in left_out]


def test_what_was_left_out_stays_so_when_a_training_goes_on_from_before_it(
    tmp_path: Path, poisoned: dict[str, Path]
) -> None:
    config = TrainConfig.model_validate({**CONFIG, "epochs": 1, "on_spike": "stop"})

    def steps(left_out: tuple[int, ...], stop_after: int) -> list[int]:
        stopping, output = Stopping(), tmp_path / f"stopped after {stop_after}"
        output.mkdir()

        def tell(done: int, *_: Any, **__: Any) -> None:
            stopping.asked = stopping.asked or done >= stop_after

        work = Work(tmp_path / "work", Runtime(device="cpu"), tell=tell)
        attempt(config, poisoned, output, work, Attempt("cpu", 1, "none", 6, left_out=left_out), Group(), stopping)
        return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]

    with pytest.raises(SystemExit):
        steps((2,), 1)
    assert {path.name for path in (tmp_path / "work/checkpoints").iterdir()} <= {"1", "2"}, "before what was left out"
    assert steps((), 99) == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("policy", ["note", "stop"])
def test_what_is_no_number_is_never_only_noted(tmp_path: Path, poisoned: dict[str, Path], policy: str) -> None:
    with pytest.raises(UserError, match=r"loss is nan in step 3; its rows: chat/00000 row 13.*on_spike to rollback"):
        train(tmp_path / "run", poisoned, {**CONFIG, "on_spike": policy})


def test_a_training_of_which_every_step_was_left_out_says_so(tmp_path: Path, poisoned: dict[str, Path]) -> None:
    rows = [[58, 59, 60, 61]] * 2
    inputs = {**poisoned, **tiny.plan(tmp_path / "all", rows, global_batch=1, packed=False)}
    with pytest.raises(UserError, match=r"each of the 2 steps was left out, .*loss is nan in step 2.* row 12\)"):
        train(tmp_path / "run", inputs, {**CONFIG, "epochs": 1, "on_spike": "rollback"})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=FEWEST, max_size=2 * WINDOW), st.floats(0.1, 100))
def test_a_spike_is_what_lies_six_deviations_above_the_window(past: list[float], value: float) -> None:
    watch = Watch.after({"loss": each, "grad_norm": 1.0} for each in past)
    window = past[-WINDOW:]
    bound = statistics.fmean(window) + max(SIGMAS * statistics.pstdev(window), LEAST)
    found = watch.look({"loss": value, "grad_norm": 1.0})
    if abs(value - bound) > 1e-9:
        assert (found is not None) == (value > bound)


def test_a_loss_that_had_come_to_zero_may_rise_a_little() -> None:
    watch = Watch.after({"loss": 0.0, "grad_norm": 0.0} for _ in range(WINDOW))
    assert watch.look({"loss": 1e-6, "grad_norm": 1e-6}) is None
    assert watch.look({"loss": 0.5, "grad_norm": 0.0}) is not None


def test_a_few_steps_tell_nothing_of_spikes() -> None:
    watch = Watch.after({"loss": 1.0, "grad_norm": 1.0} for _ in range(FEWEST - 1))
    assert watch.look({"loss": 100.0, "grad_norm": 1.0}) is None
