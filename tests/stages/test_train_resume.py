"""A training run that is killed, stopped or damaged goes on and computes the losses it would have computed."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages import arithmetic
from stages.errors import UserError
from stages.identity import tree_of
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.train import STAGE, TrainConfig, checkpoints, optimizers
from tests.stages import tiny

CONFIG: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-2}
"""Three epochs, so that the order of steps counts."""
ADAPTERS: dict[str, dict[str, Any]] = {"lora": {"lora": {"dropout": 0.1}}, "full": {}}
"""Dropout, so that the random state counts."""

UNLIKE = (
    "adafactor",
    "adamw_16bit",
    "adamw_8bit",
    "ademamix_8bit",
    "apollo_adamw",
    "galore_adafactor",
    "galore_adamw",
    "schedule_free_adamw",
    "stable_adamw",
)
"""Optimizers whose state is not that of torch's own."""

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.stages.test_train_resume import run

when, folder = sys.argv[1], Path(sys.argv[2])
inputs = {name: folder / name for name in ("model", "tokens", "plan")}

def die(event, arguments):
    # Real deaths at chosen moments: before a file of the second save is opened, or before it is made visible.
    here = " ".join(str(a) for a in arguments[:2])
    if event == "open" and when == "saving" and "checkpoint-2/trainer_state" in here:
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "os.rename" and when == "renaming" and here.split()[0].endswith("checkpoint-2"):
        os.kill(os.getpid(), signal.SIGKILL)

def tell(done, total=None, unit="", **metrics):
    if when == "saved" and metrics.get("checkpoint") == "2":
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
run(folder, inputs, METHOD, tell, save_seconds=1e-9)
"""


def run(
    folder: Path, inputs: dict[str, Path], method: str, tell: Any = None, config: Any = None, **runtime: Any
) -> Facts:
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    torch.set_num_threads(1)
    work = Work(
        folder / "work", Runtime.model_validate({"device": "cpu", **runtime}), **({"tell": tell} if tell else {})
    )
    section = TrainConfig.model_validate({**CONFIG, **ADAPTERS[method], "method": method, **(config or {})})
    return STAGE.run(section, inputs, output, work)


def prepare(folder: Path) -> dict[str, Path]:
    return {"model": tiny.llama(folder / "model"), **tiny.plan(folder, tiny.documents())}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The outputs of a run that nothing happened to, by method."""
    found = {}
    for method in ("lora", "full"):
        folder = tmp_path_factory.mktemp(method)
        run(folder, prepare(folder), method)
        found[method] = folder / "output"
    return found


@pytest.mark.failure(
    what="the trainer is killed before, in and after writing a checkpoint",
    outcome="the next run goes on from the newest whole one and gives the same bytes",
)
@pytest.mark.parametrize(
    ("when", "method", "resumed"),
    [
        ("saved", "lora", (2, 3)),
        pytest.param("renaming", "full", (1,), marks=pytest.mark.full),
        pytest.param("saving", "lora", (1,), marks=pytest.mark.full),
    ],
)
def test_kill_9_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    tmp_path: Path, unbroken: dict[str, Path], when: str, method: str, resumed: tuple[int, ...]
) -> None:
    inputs = prepare(tmp_path)
    script = KILLED.replace("METHOD", repr(method))
    died = subprocess.run(
        [sys.executable, "-c", script, when, str(tmp_path)], capture_output=True, cwd=Path(__file__).parents[2]
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    facts = run(tmp_path, inputs, method)
    assert facts["resumed_at_step"] in resumed  # a save goes on beside the training
    assert facts["skipped_checkpoints"] == []
    assert tree_of(tmp_path / "output") == tree_of(unbroken[method])


def warn(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
    """A spot machine's warning once a step's loss was told."""
    if done >= 1 and "loss" in metrics:
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_the_next_call_goes_on(tmp_path: Path, unbroken: dict[str, Path]) -> None:
    inputs = prepare(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, inputs, "lora", warn)
    assert stopped.value.code == 75
    assert not any((tmp_path / "output").iterdir())
    facts = run(tmp_path, inputs, "lora")
    assert 0 < facts["resumed_at_step"] < facts["steps"]
    assert tree_of(tmp_path / "output") == tree_of(unbroken["lora"])


@pytest.mark.parametrize("optimizer", ["muon", *(pytest.param(name, marks=pytest.mark.full) for name in UNLIKE)])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights_by_any_optimizer(
    tmp_path: Path, optimizer: str
) -> None:
    schedule = "constant" if optimizer.startswith("schedule_free") else "cosine"
    low_rank = {"rank": 8, "update_proj_gap": 2} if optimizers.find(optimizer).low_rank else {}
    config = {"optimizer": optimizer, "schedule": schedule, "optimizer_options": low_rank, "max_steps": 6}
    inputs = prepare(tmp_path)
    run(tmp_path / "whole", inputs, "full", config=config)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", inputs, "full", warn, config=config)
    facts = run(tmp_path / "parts", inputs, "full", config=config)
    assert 0 < facts["resumed_at_step"] < facts["steps"]
    assert tree_of(tmp_path / "parts/output") == tree_of(tmp_path / "whole/output")


@pytest.mark.parametrize(
    "has", [pytest.param(True, id="split first"), pytest.param(False, id="float32 first", marks=pytest.mark.full)]
)
def test_what_began_in_bfloat16_goes_on_where_there_is_none_and_back(
    tmp_path: Path, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 16 + 16 bits and of 32 are the same weights: updates that 16 bits do not hold are lost by neither."""
    config = {"epochs": 1, "max_steps": 20, "learning_rate": 1e-5, "schedule": "constant", "warmup": 0}
    inputs = prepare(tmp_path)
    start = load_file(inputs["model"] / "model.safetensors")

    def moved(folder: Path) -> torch.Tensor:
        found = load_file(folder / "output/weights/model.safetensors")
        return torch.cat([(weight - start[name]).flatten() for name, weight in found.items()])

    monkeypatch.setattr(arithmetic, "cpu_has_bf16", lambda: not has)
    run(tmp_path / "whole", inputs, "full", config=config)
    monkeypatch.setattr(arithmetic, "cpu_has_bf16", lambda: has)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", inputs, "full", warn, config=config)
    monkeypatch.setattr(arithmetic, "cpu_has_bf16", lambda: not has)
    facts = run(tmp_path / "parts", inputs, "full", config=config)
    assert 0 < facts["resumed_at_step"] < facts["steps"]
    wanted = moved(tmp_path / "whole")
    assert (moved(tmp_path / "parts") - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.failure(
    what="a checkpoint is damaged",
    outcome="it is passed over and named; the one before is used",
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, unbroken: dict[str, Path]) -> None:
    inputs = prepare(tmp_path)
    run(tmp_path, inputs, "lora", save_seconds=1e-9)
    newest, older = sorted((tmp_path / "work/checkpoints").iterdir(), key=lambda p: int(p.name), reverse=True)
    path = newest / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    facts = run(tmp_path, inputs, "lora")
    assert facts["resumed_at_step"] == int(older.name)
    assert facts["skipped_checkpoints"] == [f"checkpoint {newest.name}: weights.safetensors missing or damaged"]
    assert tree_of(tmp_path / "output") == tree_of(unbroken["lora"])


def test_a_checkpoint_of_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    run(tmp_path, inputs, "lora", save_seconds=1e-9)
    changed = TrainConfig.model_validate({**CONFIG, **ADAPTERS["lora"], "method": "lora", "learning_rate": 2e-2})
    work = Work(tmp_path / "work", Runtime(device="cpu"))
    with pytest.raises(UserError, match=r"another recipe \(train.learning_rate 0.01 → 0.02\): remove that folder"):
        STAGE.run(changed, inputs, tmp_path / "output", work)
    plan = tiny.plan(tmp_path / "other", tiny.documents(seed=1))
    with pytest.raises(UserError, match=r"another recipe .*another bins"):
        run(tmp_path, {**inputs, **plan}, "lora")


@pytest.mark.failure(
    what="the disk is full when a checkpoint is written (a limit on file sizes stands in)",
    outcome="training goes on without it and says so",
)
def test_a_full_disk_costs_the_checkpoint_and_is_told_and_training_goes_on(
    tmp_path: Path, unbroken: dict[str, Path]
) -> None:
    inputs = prepare(tmp_path)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    told: list[dict[str, Any]] = []

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        told.append(metrics)
        full = "loss" in metrics and not any("note" in each for each in told)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if full else most, most))

    try:
        facts = run(tmp_path, inputs, "lora", tell, save_seconds=1e-9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert re.match(r"the checkpoint of step \d+ was not written to .*GB free\)", facts["notes"][0])
    assert [each["note"] for each in told if "note" in each] == facts["notes"]
    assert any("checkpoint" in each for each in told), "later ones are written"
    assert tree_of(tmp_path / "output") == tree_of(unbroken["lora"])


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    told: list[float] = []
    first = run(tmp_path, inputs, "lora", save_seconds=1e-9)
    assert isinstance(first["steps"], int)
    second = run(tmp_path, inputs, "lora", lambda done, *_, **metrics: told.append(done) if "loss" in metrics else None)
    assert second["resumed_at_step"] == first["steps"] - 1
    assert told == [first["steps"]]


def test_checkpoints_hold_no_pickle_that_runs_code(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    run(tmp_path, inputs, "full", save_seconds=1e-9)
    newest, _ = checkpoints.newest(tmp_path / "work/checkpoints")
    assert newest is not None
    names = {path.name for path in newest.iterdir()}
    assert "training_args.bin" not in names
    assert json.loads((newest / "complete.json").read_text())
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(newest / name, weights_only=True)
