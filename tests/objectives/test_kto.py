"""KTO: packed it gives what the paper's formula gives, answer by answer, whatever the micro-batch; and it learns."""

import hashlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from packing.collate import PackedBins, collate
from stages.errors import UserError
from stages.marks import TRAIN_NO
from stages.mismatched import mismatched
from stages.objectives import kto
from stages.runtime import Runtime
from stages.score import STAGE as SCORE
from stages.score import ScoreConfig
from stages.stage import Work
from stages.tables import read_table
from stages.train import STAGE as TRAIN
from stages.train import TrainConfig
from tests.stages import tiny
from tests.stages.packed import Packed, shard, turns

ROWS = 40


def judged(tokens: Path, labels: tuple[bool, ...] = (True, False)) -> None:
    """Answers that count up and are good, and answers that count down and are bad; two to each prompt, side by side."""
    random = np.random.default_rng(1)
    made: list[dict[str, Any]] = []
    for number in range(ROWS):
        good = labels[number % len(labels)]
        start = 12 + number // 2
        answer = [start + (1 if good else -1) * i for i in range(int(random.integers(3, 9)))]
        made.append(
            {
                "row": number,
                "ids": [3, 4, start, 5, 6, 8, *answer, 7],
                "spans": turns(("user", 1, TRAIN_NO), ("assistant", len(answer))),
                "identity": hashlib.sha256(str(number).encode()).digest()[:16],
                "extra": json.dumps({"label": good}),
            }
        )
    shard(tokens, "judged/00000", made, kind="unpaired_preference")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Model, tokens, plan and reference."""
    model = tiny.llama(tmp_path / "model")
    judged(tmp_path / "tokens")
    packed = Packed(tmp_path / "tokens", tmp_path / "plan", sequence_length=64, global_batch=4)
    place = tmp_path / "reference/judged/00000"
    place.mkdir(parents=True)
    work = Work(tmp_path / "w", Runtime(device="cpu"))
    SCORE.run(ScoreConfig(precision="fp32"), {"model": model, "tokens": tmp_path / "tokens/judged/00000"}, place, work)
    return {
        "model": model,
        "tokens": tmp_path / "tokens",
        "plan": packed.output,
        "reference": tmp_path / "reference",
    }


def train(
    inputs: dict[str, Path], folder: Path, *, micro_batch: int = 1, tell: Any = None, **config: Any
) -> list[dict[str, float]]:
    settings = {"objective": "kto", "learning_rate": 1e-2, "precision": "fp32", "max_steps": 12, "lora": {"rank": 4}}
    (folder / "output").mkdir(parents=True, exist_ok=True)
    runtime = Runtime.model_validate({"device": "cpu", "micro_batch": micro_batch})
    work = Work(folder / "work", runtime, **({"tell": tell} if tell else {}))
    TRAIN.run(TrainConfig.model_validate({**settings, **config}), inputs, folder / "output", work)
    return [json.loads(line) for line in (folder / "output/metrics.jsonl").read_text().splitlines()]


def log_prob(model: Any, ids: list[int], begin: int) -> float:
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[at - 1, ids[at]].item() for at in range(begin, len(ids)))


def test_the_other_answer_is_one_to_another_prompt(tmp_path: Path) -> None:
    judged(tmp_path)
    table = read_table(tmp_path / "judged/00000/tokens.arrow")
    rows = table["ids"].to_pylist()
    for number, (ids, begin) in enumerate(mismatched(table)):
        other = rows[(number + (2 if number % 2 == 0 else 1)) % ROWS]
        assert ids.tolist() == rows[number][:6] + other[6:]
        assert begin == 6
    cut = [len(ids) for ids, _ in mismatched(table, most=10)]
    assert max(cut) == 10


def test_an_answer_of_a_row_that_is_too_long_is_cut_with_another_prompt(tmp_path: Path) -> None:
    """Or a step would hold a document of the model's whole context, which the plan has left out."""
    made = []
    for number, size in enumerate((5, 150, 5, 5, 150, 5)):
        ids = [3, 4, 12 + number, 5, 6, 8, *(3 + at % 60 for at in range(size)), 7]
        row = {"row": number, "ids": ids, "spans": turns(("user", 1, TRAIN_NO), ("assistant", size))}
        identity = number.to_bytes(8, "big") * 2
        made.append({**row, "identity": identity, "extra": json.dumps({"label": number % 2 == 0})})
    shard(tmp_path / "tokens", "judged/00000", made, kind="unpaired_preference")
    packed = Packed(tmp_path / "tokens", tmp_path / "plan", sequence_length=64, global_batch=4)
    assert packed.facts["dropped"] == {"overlong": 2}
    place = tmp_path / "reference/judged/00000"
    place.mkdir(parents=True)
    given = {"model": tiny.llama(tmp_path / "model"), "tokens": tmp_path / "tokens/judged/00000"}
    SCORE.run(ScoreConfig(precision="fp32"), given, place, Work(tmp_path / "w", Runtime(device="cpu")))
    bins = PackedBins(tmp_path / "tokens", packed.output, reference=tmp_path / "reference")
    crossed = [bins[number].mismatched for number in range(len(bins))]
    assert sorted(int(length) for each in crossed if each for length in each.lengths) == [12, 12, 64, 64]
    batch = kto.prepare(collate([bins[number] for number in range(len(bins))]))
    assert sorted(batch["mismatched"]["answer_tokens"].tolist()) == [6, 6, 58, 58]
    assert len(batch["mismatched"]["reference"]) == 128


def test_the_loss_is_the_papers(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """On a model that has moved away from the one that gave the reference."""
    before = AutoModelForCausalLM.from_pretrained(inputs["model"], attn_implementation="eager")
    moved = AutoModelForCausalLM.from_pretrained(inputs["model"], attn_implementation="eager")
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    bins = PackedBins(inputs["tokens"], inputs["plan"], reference=inputs["reference"])
    rows = read_table(inputs["tokens"] / "judged/00000/tokens.arrow")["ids"].to_pylist()
    crossed = [
        (ids.tolist(), begin) for ids, begin in mismatched(read_table(inputs["tokens"] / "judged/00000/tokens.arrow"))
    ]

    ratios = {tuple(ids): log_prob(moved, ids, 6) - log_prob(before, ids, 6) for ids in rows}
    others = [log_prob(moved, ids, begin) - log_prob(before, ids, begin) for ids, begin in crossed]
    z = max(0.0, sum(others) / len(others))
    beta, weights = 0.3, {True: 1.2, False: 0.7}
    expected = 0.0
    for number, ids in enumerate(rows):
        sign = 1 if number % 2 == 0 else -1
        expected += weights[number % 2 == 0] * (1 - 1 / (1 + math.exp(-beta * sign * (ratios[tuple(ids)] - z))))

    options = kto.KtoOptions(beta=beta, desirable_weight=weights[True], undesirable_weight=weights[False])
    batch = kto.prepare(collate([bins[number] for number in range(len(bins))], pad_to_multiple=16))
    assert len(batch["good"]) == ROWS
    with torch.no_grad():
        kl = kto.baseline(moved, options, batch)(batch)["kl"]
        assert kl.item() == pytest.approx(sum(others), rel=1e-3)
        found = kto.loss(moved, options, batch)({**batch, "baseline": {"kl": kl / ROWS}})
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("held", [0.0, 0.3])
def test_training_tells_good_from_bad_whatever_the_micro_batch(
    tmp_path: Path, inputs: dict[str, Path], held: float
) -> None:
    if held:  # also looked at while training
        inputs["plan"] = Packed(inputs["tokens"], tmp_path / "held/plan", global_batch=4, heldout_fraction=held).output
    more = {"evaluate_every": 0.5} if held else {}
    steps = train(inputs, tmp_path / "one", **more)
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-4), "nothing has moved"
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert steps[-1]["loss"] < 0.45
    assert steps[-1]["accuracy"] > 0.7 > steps[0]["accuracy"]
    assert steps[-1]["margin"] > 0.2
    if held:
        looks = json.loads((tmp_path / "one/output/train.json").read_text())["heldout"]["looks"]
        assert looks[-1]["loss"] < looks[0]["loss"] < 0.5
        return
    others = train(inputs, tmp_path / "four", micro_batch=4)
    for one, other in zip(steps, others, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-2, abs=1e-4)


def test_a_run_that_was_stopped_goes_on_as_it_would_have(tmp_path: Path, inputs: dict[str, Path]) -> None:
    whole = train(inputs, tmp_path / "whole", max_steps=5)

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if done >= 1 and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        train(inputs, tmp_path / "parts", tell=tell, max_steps=5)
    assert stopped.value.code == 75
    assert train(inputs, tmp_path / "parts", max_steps=5) == whole


def test_labels_of_one_class_only_are_refused_before_anything_is_scored(tmp_path: Path) -> None:
    judged(tmp_path / "tokens", labels=(True,))
    with pytest.raises(UserError, match=r"all 40 rows that train are labelled true.*Add some labelled false"):
        Packed(tmp_path / "tokens", tmp_path / "plan")
