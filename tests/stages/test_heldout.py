"""Held-out judged answers: measured as written out by hand, laid side by side, and a gate can stand on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages import evaluate
from stages.compare import PREFERENCES, compare, report
from stages.gate import Gate, decide
from stages.identity import Json
from stages.marks import TRAIN_NO
from stages.runtime import Runtime
from stages.stage import Work
from tests.stages.packed import Packed, turns
from tests.stages.tiny import write_tokens

PROMPT = [40, 41, 42, 43, 44]


def rows(kind: str) -> list[dict[str, Any]]:
    """Answers of several lengths to one prompt, in pairs or with labels."""
    made = []
    for number in range(24):
        answer = [50 + (7 * number + 5 * at) % 90 for at in range(2 + number % 5)]
        made.append(
            {
                "row": number // 2 if kind == "preference" else number,
                "ids": [*PROMPT, 45, 46, *answer, 1],
                "spans": turns(("user", 2, TRAIN_NO), ("assistant", len(answer))),
                "identity": number.to_bytes(8, "big") * 2,
                "extra": "" if kind == "preference" else json.dumps({"label": number % 3 == 0}),
            }
        )
    return made


@pytest.fixture
def measured(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path) -> tuple[Path, list[Path], Json]:
    """The folder of scores, the two models, and base and tuned models side by side."""
    kind = request.param
    for name, split in (("judged", "train"), ("kept", "heldout")):
        place = tmp_path / "tokens" / name / "00000"
        shift = 1000 if name == "judged" else 0  # what trains has identities of its own
        made = [{**row, "identity": (shift + i).to_bytes(8, "big") * 2} for i, row in enumerate(rows(kind))]
        written = write_tokens(place, 258, made, extra=True)
        counts = {**written, "kind": kind, "rows": 12 if kind == "preference" else 24, "dropped": {}}
        (place / "counts.json").write_text(json.dumps({**counts, "source": name, "split": split}))
    plan = Packed(tmp_path / "tokens", tmp_path / "plan", decontaminate=0.0).output
    tuned = tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tuned)
    for path in tiny_model.glob("*token*"):
        (tuned / path.name).write_bytes(path.read_bytes())
    scores = tmp_path / "scores"
    for name, weights in (("base", tiny_model), ("tuned", tuned)):
        output = scores / name / "heldout_loss"
        output.mkdir(parents=True)
        inputs = {"weights": weights, "plan": plan}
        work = Work(tmp_path / "work", Runtime(device="cpu"))
        evaluate.run(evaluate.Measure(precision="fp32"), inputs, output, work)
    return scores, [tiny_model, tuned], compare(scores)


def by_hand(folder: Path, kind: str) -> list[tuple[float, int]]:
    """Log-probability and tokens of each answer."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    found = []
    for row in rows(kind):
        with torch.no_grad():
            logits = model(torch.tensor([row["ids"]])).logits[0].log_softmax(-1)
        begin = len(PROMPT) + 2
        answer = range(begin, len(row["ids"]))
        found.append((sum(float(logits[at - 1, row["ids"][at]]) for at in answer), len(answer)))
    return found


@pytest.mark.parametrize("measured", ["preference"], indirect=True)
def test_pairs_are_counted_where_the_chosen_answer_has_more_a_token(measured: tuple[Path, list[Path], Json]) -> None:
    _, models, scores = measured
    task = scores["tasks"][PREFERENCES]
    assert (task["metric"], task["n"]) == ("preference_accuracy", 12)
    for name, folder in zip(("base", "tuned"), models, strict=True):
        answers = by_hand(folder, "preference")
        margins = [c / m - r / n for (c, m), (r, n) in zip(answers[::2], answers[1::2], strict=True)]
        assert task[name]["value"] == pytest.approx(sum(margin > 0 for margin in margins) / 12)
        assert task["margin"][name]["value"] == pytest.approx(sum(margins) / 12, abs=1e-4)
        chosen = answers[::2]
        loss = -sum(c for c, _ in chosen) / sum(n for _, n in chosen)
        assert scores["heldout_loss"][name]["value"] == pytest.approx(loss, rel=1e-4)
    text = report(scores)
    assert f"| {PREFERENCES} | preference_accuracy | 12 |" in text
    assert "Margin in heldout_preferences, nats a token: base " in text


@pytest.mark.parametrize("measured", ["unpaired_preference"], indirect=True)
def test_good_answers_are_counted_against_bad_ones(measured: tuple[Path, list[Path], Json]) -> None:
    _, models, scores = measured
    task = scores["tasks"][PREFERENCES]
    assert (task["metric"], task["n"]) == ("good_over_bad", 8)
    for name, folder in zip(("base", "tuned"), models, strict=True):
        means = [total / count for total, count in by_hand(folder, "unpaired_preference")]
        good, bad = means[::3], [mean for number, mean in enumerate(means) if number % 3]
        wins = sum(g > b for g in good for b in bad)
        assert task[name]["value"] == pytest.approx(wins / len(good) / len(bad), abs=1e-6)


@pytest.mark.parametrize("measured", ["preference"], indirect=True)
def test_a_gate_stands_on_held_out_preferences(measured: tuple[Path, list[Path], Json]) -> None:
    _, _, scores = measured
    refused = decide(Gate(tasks=(PREFERENCES,), min_gain=1.0), scores)
    assert not refused["passed"]
    assert refused["reasons"][0].startswith("heldout_preferences: gains")
    assert decide(Gate(tasks=(PREFERENCES,), min_gain=-1.0, require="nothing"), scores)["passed"]
