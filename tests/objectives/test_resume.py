"""Whatever is trained for: killed when its first checkpoint stands, a training goes on to the bytes of one that nothing
happened to."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.identity import tree_of
from stages.objectives import names
from stages.runtime import Runtime
from stages.score import STAGE as SCORE
from stages.score import ScoreConfig
from stages.stage import Facts, Work
from stages.train import STAGE as TRAIN
from stages.train import TrainConfig
from tests.objectives.test_on_a_gpu import KINDS, ONLINE, SCORED, conversations, teacher
from tests.stages import test_train_online
from tests.stages.packed import Packed

STEPS = 5
KILLED = """
import json, os, signal, sys
from pathlib import Path
from tests.objectives.test_resume import train

def tell(done, total=None, unit="", **metrics):
    if "checkpoint" in metrics:
        os.kill(os.getpid(), signal.SIGKILL)

folder, inputs, config = json.loads(sys.argv[1])
train(Path(folder), {name: Path(path) for name, path in inputs.items()}, config, tell, save_seconds=1e-9)
"""


def train(folder: Path, inputs: dict[str, Path], config: dict[str, Any], tell: Any = None, **runtime: Any) -> Facts:
    torch.set_num_threads(1)  # in this process as in the one that is killed: sums depend on it
    (folder / "output").mkdir(parents=True, exist_ok=True)
    place = Runtime.model_validate({"device": "cpu", "workers": 1, "allow_code": True, **runtime})
    work = Work(folder / "work", place, **({"tell": tell} if tell else {}))
    return TRAIN.run(TrainConfig.model_validate(config), inputs, folder / "output", work)


def prepare(folder: Path, model: Path, objective: str) -> tuple[dict[str, Path], dict[str, Any]]:
    """The inputs and the config of a short training."""
    config: dict[str, Any] = {"objective": objective, "max_steps": STEPS, "precision": "fp32", "lora": {"rank": 4}}
    tokens = folder / "tokens"
    inputs = {"model": model, "tokens": tokens}
    if objective in ONLINE:
        test_train_online.prompts(tokens, model, [f"say {word}\n" for word in ("one", "two", "three")])
        options = test_train_online.recipe(folder, objective)["objective_options"] | {"group_size": 4}
        if objective == "gdpo":
            options["rewards"]["short"] = {"reward": "length", "options": {"most": 8}}
        if objective == "ebft":
            options = {"group_size": 4, "prompts_per_step": 2}
        if objective == "on_policy_distillation":
            options = {"prompts_per_step": 2, "max_new_tokens": 12, "student_share": 0.5}
            inputs["teacher"] = teacher(model, folder / "teacher")
        config["objective_options"] = options
    else:
        KINDS.get(objective, conversations)(tokens)
        config["lora"]["dropout"] = 0.1  # so that the random state counts
    plan = Packed(tokens, folder / "plan", sequence_length=128, global_batch=4, decontaminate=0.0).output
    if objective in SCORED:
        shard = next(path.parent for path in tokens.glob("*/00000/tokens.arrow") if "kept" not in path.parts)
        scored = folder / "reference" / shard.relative_to(tokens)
        scored.mkdir(parents=True)
        scorer = {"model": model, "tokens": shard}
        if objective == "distillation":
            scorer |= {"tokenizer": model, "model": teacher(model, folder / "teacher")}
        how = ScoreConfig(precision="fp32", top_k=SCORED[objective])
        SCORE.run(how, scorer, scored, Work(folder / "scoring", Runtime(device="cpu")))
        inputs["reference"] = folder / "reference"
    return {**inputs, "plan": plan}, config


@pytest.mark.full
@pytest.mark.parametrize("objective", names())
def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path: Path, tiny_model: Path, objective: str) -> None:
    inputs, config = prepare(tmp_path, tiny_model, objective)
    train(tmp_path / "whole", inputs, config)
    asked = json.dumps([str(tmp_path / "killed"), {name: str(path) for name, path in inputs.items()}, config])
    died = subprocess.run(
        [sys.executable, "-c", KILLED, asked], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    facts = train(tmp_path / "killed", inputs, config)
    assert 0 < facts["resumed_at_step"] < STEPS  # type: ignore[operator]
    assert tree_of(tmp_path / "killed/output") == tree_of(tmp_path / "whole/output")
