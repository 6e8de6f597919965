"""Reward and process-reward models: the papers' losses, above chance on held-out rows, transformers' classifiers."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from flows.recipe import loads
from packing.collate import PackedBins, collate
from stages import evaluate, heads, merge, objectives
from stages.compare import PREFERENCES, compare
from stages.errors import UserError
from stages.generation import load_network
from stages.heldout import measure
from stages.marks import TRAIN_NO
from stages.objectives import process_reward, reward
from stages.runtime import Runtime
from stages.stage import Work
from stages.train import STAGE as TRAIN
from stages.train import TrainConfig
from tests.stages.packed import Packed, spans, turns
from tests.stages.test_merge import make_model
from tests.stages.tiny import write_tokens

VOCABULARY = 258


def put(tokens: Path, kind: str, made: list[dict[str, Any]]) -> None:
    """As shards of what trains and what is held out; every fifth row is."""
    for name, split in (("judged", "train"), ("kept", "heldout")):
        place = tokens / name / "00000"
        some = [row for row in made if (row["row"] % 5 == 0) == (split == "heldout")]
        written = write_tokens(place, VOCABULARY, some, extra=True)
        rows = len({row["row"] for row in some})
        counts = {**written, "kind": kind, "rows": rows, "dropped": {}, "source": name, "split": split}
        (place / "counts.json").write_text(json.dumps(counts))


def pairs(tokens: Path) -> None:
    """Chosen answers are of lower tokens than rejected ones."""
    random = np.random.default_rng(1)
    made = []
    for number in range(120):
        start = int(random.integers(60, 200))
        for lowest in (60, 130):
            answer = random.integers(lowest, lowest + 70, int(random.integers(3, 9))).tolist()
            made.append(
                {
                    "row": number,
                    "ids": [30, 31, start, 32, 33, 34, *answer, 35],
                    "spans": turns(("user", 1, TRAIN_NO), ("assistant", len(answer))),
                    "identity": number.to_bytes(8, "big") * 2,
                    "extra": json.dumps({"margin": 0.5}) if number % 2 else "",
                }
            )
    put(tokens, "preference", made)


def solutions(tokens: Path) -> None:
    """Steps of three tokens, right where the third is a low one."""
    random = np.random.default_rng(2)
    made = []
    for number in range(160):
        ids, told, labels = [30, 31, 32], [(0, 3, 1, 0, "user", TRAIN_NO)], []
        for turn in range(1, 1 + int(random.integers(1, 4))):
            right = bool(random.random() < 0.5)
            begin, lowest = len(ids), 60 if right else 130
            ids += [*random.integers(140, 200, 2).tolist(), int(random.integers(lowest, lowest + 4)), 36]
            told += [(begin, begin + 3, 1, turn, "text", 0), (begin + 3, begin + 4, 2, turn, "text", 0)]
            labels.append(right)
        made.append(
            {
                "row": number,
                "ids": ids,
                "spans": spans(*told),
                "identity": number.to_bytes(8, "big") * 2,
                "extra": json.dumps({"labels": labels}),
            }
        )
    put(tokens, "stepwise", made)


MADE = {"reward": pairs, "process_reward": solutions}


@pytest.fixture
def inputs(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path) -> dict[str, Path]:
    """Model, tokens and plan for an objective."""
    MADE[request.param](tmp_path / "tokens")
    plan = Packed(tmp_path / "tokens", tmp_path / "plan", sequence_length=128, global_batch=4, decontaminate=0.0).output
    return {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": plan}


def train(inputs: dict[str, Path], folder: Path, tell: Any = None, **config: Any) -> Path:
    output = folder / "output"
    output.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"learning_rate": 1e-2, "precision": "fp32", "max_steps": 40, "warmup": 0}
    if config.get("method") != "full":
        settings["lora"] = {"rank": 8}
    work = Work(folder / "work", Runtime(device="cpu"), **({"tell": tell} if tell else {}))
    TRAIN.run(TrainConfig.model_validate({**settings, **config}), inputs, output, work)
    return output


def measures(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def merged(inputs: dict[str, Path], trained: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder.parent / "templates").mkdir()
    given = {"model": inputs["model"], "trained": trained, "templates": folder.parent / "templates"}
    merge.run(merge.MergeConfig(), given, folder, Work(folder.parent / "w", Runtime(device="cpu")))
    return folder


def scored(inputs: dict[str, Path], weights: Path, folder: Path) -> Any:
    """The base model and this one on the held-out rows."""
    for name, model in (("base", inputs["model"]), ("tuned", weights)):
        output = folder / name / "heldout_loss"
        output.mkdir(parents=True)
        given = {"weights": model, "plan": inputs["plan"]}
        evaluate.run(evaluate.Measure(precision="fp32"), given, output, Work(folder / "w", Runtime(device="cpu")))
    return compare(folder)


def batch_of(inputs: dict[str, Path], objective: str) -> tuple[PackedBins, dict[str, Any]]:
    bins = PackedBins(inputs["tokens"], inputs["plan"])
    return bins, objectives.find(objective).prepare(collate([bins[0], bins[1]], pad_to_multiple=64))


def headed(inputs: dict[str, Path], outputs: int) -> tuple[Any, Any]:
    """A model with a head, and a function that gives what the head says after some tokens, one document at a time."""
    torch.manual_seed(1)
    model = load_network(inputs["model"], "fp32", "cpu", packed=True)
    heads.attach(model, outputs)
    plain = load_network(inputs["model"], "fp32", "cpu", packed=False)

    def alone(ids: list[int]) -> list[float]:
        hidden = plain.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return model.score(hidden).tolist()

    return model, alone


@pytest.mark.parametrize("inputs", ["reward"], indirect=True)
def test_the_reward_loss_is_the_papers(inputs: dict[str, Path]) -> None:
    bins, batch = batch_of(inputs, "reward")
    model, alone = headed(inputs, 1)
    expected, right = 0.0, 0
    for packed in (bins[0], bins[1]):
        documents = np.split(packed.ids, np.cumsum(packed.lengths)[:-1])
        for chosen, rejected, extra in zip(documents[::2], documents[1::2], packed.extra[::2], strict=True):
            (c,), (r,) = alone(chosen.tolist()), alone(rejected.tolist())
            expected += math.log(1 + math.exp(-(c - r - extra.get("margin", 0.0)))) + 0.1 * (c + r) ** 2
            right += c > r
    with torch.no_grad():
        found = reward.loss(model, reward.RewardOptions(centre=0.1), batch)(batch)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert found["accuracy"].item() == right


@pytest.mark.parametrize("inputs", ["process_reward"], indirect=True)
def test_the_process_reward_loss_is_cross_entropy_at_the_ends_of_steps(inputs: dict[str, Path]) -> None:
    bins, batch = batch_of(inputs, "process_reward")
    model, alone = headed(inputs, 2)
    expected = steps = 0.0
    for packed in (bins[0], bins[1]):
        documents = np.split(packed.ids, np.cumsum(packed.lengths)[:-1])
        for ids, extra in zip(documents, packed.extra, strict=True):
            for number, label in enumerate(extra["labels"]):
                wrong, right = alone(ids[: 3 + 4 * (number + 1)].tolist())
                mine, other = (right, wrong) if label else (wrong, right)
                expected += (1 if label else 2.0) * math.log(1 + math.exp(other - mine))
                steps += 1
    with torch.no_grad():
        found = process_reward.loss(model, process_reward.ProcessRewardOptions(wrong_weight=2.0), batch)(batch)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert objectives.find("process_reward").count(bins, [0, 1]) == steps == len(batch["ends"])


def test_steps_that_are_cut_off_are_not_judged(tmp_path: Path, tiny_model: Path) -> None:
    """Their labels would all come to stand on the last token that is left."""
    made = []
    for number, cut_label in enumerate((True, False, True, False, True)):
        labels = [number % 2 == 0] * 15 + [cut_label] * 5  # after 15 steps of 4 tokens, one is cut and four are gone
        told = [(0, 3, 1, 0, "user", TRAIN_NO)]
        for turn in range(1, 21):
            begin = 4 * turn - 1
            told += [(begin, begin + 3, 1, turn, "text", 0), (begin + 3, begin + 4, 2, turn, "text", 0)]
        ids = [30, 31, 32, *([140 + number, 150, 160, 36] * 20)]
        identity = number.to_bytes(8, "big") * 2
        extra = json.dumps({"labels": labels})
        made.append({"row": number, "ids": ids, "spans": spans(*told), "identity": identity, "extra": extra})
    put(tmp_path / "tokens", "stepwise", made)
    packed = Packed(tmp_path / "tokens", tmp_path / "plan", overlong="truncate", deduplicate=False, decontaminate=0.0)
    assert packed.facts["truncated"] == 5
    assert packed.facts["labels"] == {"false": 30, "true": 30}, "of 15 whole steps in each of 4 rows"
    for number in range(len(packed.bins)):
        batch = process_reward.prepare(collate([packed.bins[number]]))
        assert batch["ends"].tolist() == [6 + 4 * step for step in range(15)]
        assert len(set(batch["right"].tolist())) == 1
        assert objectives.find("process_reward").count(packed.bins, [number]) == 15
    found = measure(tiny_model, packed.output, "fp32", Runtime(device="cpu"), lambda *now: None)
    assert len(found.samples) == 15
    assert found.groups == [0] * 15, "the steps of one solution"


@pytest.mark.parametrize("line_end", ["\n", ""])
def test_a_reward_is_read_at_the_end_of_an_answer_where_padding_is_of_the_same_token(
    tmp_path: Path, tiny_model: Path, line_end: str
) -> None:
    """As the card loads it. transformers takes for padding what has the padding's token."""
    (tmp_path / "templates/judged").mkdir(parents=True)
    template = (tiny_model / "chat_template.jinja").read_text().replace("<|im_end|>\n", f"<|im_end|>{line_end}")
    (tmp_path / "templates/judged/chat_template.jinja").write_text(template)
    trained = tmp_path / "trained"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(trained / "weights")
    heads.attach(model, 1)
    heads.save(heads.take(model).state_dict(), trained)
    (tmp_path / "merged").mkdir()
    given = {"model": tiny_model, "trained": trained, "templates": tmp_path / "templates"}
    merge.run(merge.MergeConfig(), given, tmp_path / "merged", Work(tmp_path / "work", Runtime(device="cpu")))
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    chat = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello."}]
    asked = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        at_the_end = judge.score(judge.model(asked["input_ids"]).last_hidden_state[0, -1]).item()
        assert judge(**asked).logits.item() == pytest.approx(at_the_end, rel=1e-5)
    assert (judge.config.pad_token_id is None) == (line_end == "")


@pytest.mark.parametrize(
    ("inputs", "method"),
    [
        ("reward", "lora"),
        *(pytest.param(*one, marks=pytest.mark.full) for one in (("reward", "full"), ("process_reward", "lora"))),
    ],
    indirect=["inputs"],
)
def test_it_learns_and_is_transformers_own_classifier(tmp_path: Path, inputs: dict[str, Path], method: str) -> None:
    objective = _objective(inputs)
    trained = train(inputs, tmp_path / "train", objective=objective, method=method)
    steps = measures(trained)
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    weights = merged(inputs, trained, tmp_path / "weights")
    task = scored(inputs, weights, tmp_path / "scores")["tasks"][PREFERENCES]
    assert task["tuned"]["low"] > 0.6, "its interval is above chance"
    assert task["better"] == "tuned"
    bins = PackedBins(None, inputs["plan"])
    first = bins[0].ids[: bins[0].lengths[0]].tolist()
    kind = AutoModelForSequenceClassification if objective == "reward" else AutoModelForTokenClassification
    model = kind.from_pretrained(weights)
    model.config.pad_token_id = None  # nothing here is padding
    logits = model(torch.tensor([first])).logits[0]
    batch = objectives.find(objective).prepare(collate([bins[0]]))
    ours = heads.of(load_network(weights, "fp32", "cpu", packed=True), batch, batch["ends"])[0]
    theirs = logits if objective == "reward" else logits[int(batch["ends"][0])]
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    assert [path.name for path in weights.glob("*.bin")] == []


@pytest.mark.parametrize("inputs", ["reward"], indirect=True)
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_train_their_rows_of_the_embeddings(tmp_path: Path, inputs: dict[str, Path], tied: bool) -> None:
    given = {**inputs, "model": make_model(tmp_path / "model", tie_word_embeddings=tied)}
    lora = {"rank": 4, "new_tokens": ["a", "b"]}
    output = train(given, tmp_path, objective="reward", max_steps=3, lora=lora)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (given["model"], merged(given, output, tmp_path / "out"))
    )
    name = "model.embed_tokens.weight"
    moved = (before[name] != after[name]).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == AutoTokenizer.from_pretrained(given["model"])("ab")["input_ids"]


def _objective(inputs: dict[str, Path]) -> str:
    kind = json.loads((inputs["plan"] / "plan.json").read_text())["kind"]
    return "process_reward" if kind == "stepwise" else "reward"


@pytest.mark.parametrize("inputs", [pytest.param("reward", marks=pytest.mark.full), "process_reward"], indirect=True)
def test_a_run_that_was_stopped_goes_on_as_it_would_have(tmp_path: Path, inputs: dict[str, Path]) -> None:
    objective = _objective(inputs)
    whole = train(inputs, tmp_path / "whole", objective=objective, max_steps=6)

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if done >= 1 and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        train(inputs, tmp_path / "parts", tell, objective=objective, max_steps=6)
    assert stopped.value.code == 75
    parts = train(inputs, tmp_path / "parts", objective=objective, max_steps=6)
    assert measures(parts) == measures(whole)
    assert (parts / heads.HEAD).read_bytes() == (whole / heads.HEAD).read_bytes()


def test_steps_that_are_all_labelled_alike_are_refused(tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []
    for number, labels in enumerate(([True, True], [True])):
        told = [(0, 3, 1, 0, "user", TRAIN_NO)]
        told += [(3 + 2 * n, 5 + 2 * n, 1, 1 + n, "text", 0) for n in range(len(labels))]
        ids = list(range(30, 30 + told[-1][1]))
        row = {"row": 1 + number, "ids": ids, "spans": spans(*told), "identity": number.to_bytes(8, "big") * 2}
        made.append({**row, "extra": json.dumps({"labels": labels})})
    put(tmp_path / "tokens", "stepwise", made)
    with pytest.raises(UserError, match=r"all steps of the 2 rows that train are labelled true: .* labelled false$"):
        Packed(tmp_path / "tokens", tmp_path / "plan")
    made.append({**made[0], "row": 3, "identity": bytes([3] * 16), "extra": json.dumps({"labels": [True, False]})})
    put(tmp_path / "tokens", "stepwise", made)
    assert Packed(tmp_path / "tokens", tmp_path / "other").facts["labels"] == {"false": 1, "true": 4}


RECIPE = """
name: judge
fetch: {{model: {{path: m}}, data: {{rows: {{files: rows.jsonl}}}}}}
convert: {{format: {format}}}
train: {{objective: {objective}}}
{more}
"""


@pytest.mark.parametrize(
    ("objective", "more", "told"),
    [
        ("reward", "evaluate: {tasks: {sums: {source: rows}}}", "reward makes a model that judges.*take the tasks out"),
        ("reward", "publish: {to: out, gate: {max_heldout_loss_increase: 0.0}}", "has no held-out loss.*gate.min_gain"),
        ("process_reward", "pack: {overlong: truncate}", "cut steps off their labels: set it to drop or error"),
    ],
)
def test_what_a_judging_model_cannot_do_is_told_before_anything_runs(objective: str, more: str, told: str) -> None:
    format = "stepwise" if objective == "process_reward" else "preference"
    loads(RECIPE.format(format=format, objective=objective, more=""), "judge.yaml")
    with pytest.raises(UserError, match=told):
        loads(RECIPE.format(format=format, objective=objective, more=more), "judge.yaml")
