"""Held-out judged answers: measured as written out by hand, laid side by side, and a gate can stand on them."""

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flows.pages import scores_page
from stages import evaluate
from stages.compare import PREFERENCES, compare, report
from stages.evaluate import EvaluateConfig
from stages.gate import Gate, decide
from stages.identity import Json, Tree, tree_of
from stages.intervals import ahead
from stages.marks import TRAIN_NO
from stages.runtime import Runtime
from stages.stage import Work
from tests.stages.packed import Packed, turns
from tests.stages.tiny import write_tokens

PROMPT = [40, 41, 42, 43, 44]


def rows(kind: str, prompts: int = 12) -> list[dict[str, Any]]:
    """Answers of several lengths to so many prompts, in pairs or with labels."""
    made = []
    for number in range(24):
        answer = [50 + (7 * number + 5 * at) % 90 for at in range(2 + number % 5)]
        made.append(
            {
                "row": number // 2 if kind == "preference" else number,
                "ids": [*PROMPT, 45 + number // 2 % prompts, 46, *answer, 1],
                "spans": turns(("user", 2, TRAIN_NO), ("assistant", len(answer))),
                "identity": number.to_bytes(8, "big") * 2,
                "extra": "" if kind == "preference" else json.dumps({"label": number % 3 == 0}),
            }
        )
    return made


def scored(scores: Path, name: str, inputs: dict[str, Path], work: Path) -> None:
    output = scores / name / "heldout_loss"
    output.mkdir(parents=True)
    evaluate.run(evaluate.Measure(precision="fp32"), inputs, output, Work(work, Runtime(device="cpu")))


@pytest.fixture
def measured(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path) -> tuple[Path, list[Path], Json]:
    """The folder of scores, the two models, and base and tuned models side by side."""
    kind, *prompts = request.param.split()
    for name, split in (("judged", "train"), ("kept", "heldout")):
        place = tmp_path / "tokens" / name / "00000"
        shift = 1000 if name == "judged" else 0  # what trains has identities of its own
        answers = enumerate(rows(kind, *map(int, prompts)))
        made = [{**row, "identity": (shift + i).to_bytes(8, "big") * 2} for i, row in answers]
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
        scored(scores, name, {"weights": weights, "plan": plan}, tmp_path / "work")
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
        shares = [[g > b for b in bad] for g in good]
        expected = ahead([fmean(row) for row in shares], [fmean(column) for column in zip(*shares, strict=True)])
        assert task[name] == pytest.approx(expected.document, abs=1e-6), "both kinds of answers are a sample"


@pytest.mark.parametrize("measured", ["preference 4", "preference 12"], indirect=True)
def test_several_pairs_to_one_prompt_vary_together(measured: tuple[Path, list[Path], Json]) -> None:
    scores, _, found = measured
    told = json.loads((scores / "base/heldout_loss/scores.json").read_text())
    prompts = len(set(told["groups"]))
    assert len(told["groups"]) == 12 and prompts in (4, 12)
    task = found["tasks"][PREFERENCES]
    for each in (task["base"], task["difference"], task["margin"]["base"], task["margin"]["difference"]):
        assert ("too_few" in each) is (prompts == 4)


@pytest.mark.parametrize("measured", ["preference"], indirect=True)
def test_a_gate_stands_on_held_out_preferences(measured: tuple[Path, list[Path], Json]) -> None:
    _, _, scores = measured
    refused = decide(Gate(tasks=(PREFERENCES,), min_gain=1.0), scores)
    assert not refused["passed"]
    assert refused["reasons"][0].startswith("heldout_preferences: gains")
    assert decide(Gate(tasks=(PREFERENCES,), min_gain=-1.0, require="nothing"), scores)["passed"]


def of_another_tokenizer(model: Path, folder: Path, lost: int = 0) -> Path:
    """The same weights with the letters' ids turned round, or without the last `lost` tokens."""
    shutil.copytree(model, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    letters = [token for token, number in vocabulary.items() if number >= 2]
    ids = [vocabulary[token] for token in letters]
    turned = dict(zip(letters, ids if lost else reversed(ids), strict=True))
    kept = {token: number for token, number in turned.items() if number < len(vocabulary) - lost}
    document["model"]["vocab"] = {t: n for t, n in vocabulary.items() if n < 2} | kept
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("lost", [0, 150], ids=["other tokens", "fewer tokens"])
@pytest.mark.parametrize("measured", ["preference"], indirect=True)
def test_a_model_in_production_with_another_tokenizer_is_not_compared_over_held_out_rows(
    measured: tuple[Path, list[Path], Json], lost: int, tmp_path: Path, tiny_model: Path
) -> None:
    scores, (_, tuned), before = measured
    old, plan = of_another_tokenizer(tiny_model, tmp_path / "old", lost), tmp_path / "plan"
    trees = {"base": tree_of(tiny_model), "weights": tree_of(tuned), "production": tree_of(old), "plan": tree_of(plan)}
    listed = {part.name: part for part in evaluate.parts(EvaluateConfig(), {**trees, "rows": Tree(())})}
    assert [name for name, part in listed.items() if "tokenizer" in part.inputs] == ["production/heldout_loss"]
    scored(scores, "production", {"weights": old, "plan": plan, "tokenizer": tuned}, tmp_path / "work")
    found = compare(scores)
    assert found == {**before, "other_tokenizer": True}
    assert "has another tokenizer" in report(found) and "has another tokenizer" in scores_page(found)
    [reason] = decide(Gate(require="nothing"), found)["reasons"]
    assert "no task compares the two: add one" in reason
    nothing = Gate.model_validate({"require": "nothing", "production": {"require": "nothing"}})
    assert decide(nothing, found)["passed"]
    bounded = Gate.model_validate({"require": "nothing", "production": {"max_heldout_loss_increase": 0.1}})
    assert not decide(bounded, found)["passed"]
    task = found["tasks"][PREFERENCES]
    beside = {
        **found,
        "tasks": {"t": {**task, "over_production": {"difference": task["difference"], "better": "tuned"}}},
    }
    decision = decide(Gate(require="nothing"), beside)
    assert decision["passed"] and "has another tokenizer" in decision["reasons"][-1]


@pytest.mark.parametrize("measured", ["preference"], indirect=True)
def test_the_same_tokens_in_other_files_are_compared(
    measured: tuple[Path, list[Path], Json], tmp_path: Path, tiny_model: Path
) -> None:
    scores, (_, tuned), _ = measured
    same = Path(shutil.copytree(tiny_model, tmp_path / "same"))
    (same / "tokenizer.json").write_text(json.dumps(json.loads((same / "tokenizer.json").read_text())))
    inputs = {"weights": same, "plan": tmp_path / "plan", "tokenizer": tuned}
    scored(scores, "production", inputs, tmp_path / "work")
    found = compare(scores)
    assert found["heldout_loss"]["production"] == found["heldout_loss"]["base"] and "other_tokenizer" not in found
