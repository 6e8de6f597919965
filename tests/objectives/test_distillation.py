"""Distillation: the divergence of the coarsened distributions, from a cache that any student shares; and it learns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flows.recipe import loads
from packing.collate import PackedBins, collate
from stages.errors import UserError
from stages.generation import load_network
from stages.identity import File, Tree
from stages.objectives import distillation
from stages.runtime import Runtime
from stages.score import STAGE as SCORE
from stages.score import ScoreConfig, parts
from stages.stage import Work
from stages.tables import read_table
from stages.train import STAGE as TRAIN
from stages.train import TrainConfig
from tests.stages.packed import Packed, turns
from tests.stages.tiny import other_weights, write_tokens

K = 5


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path) -> dict[str, Path]:
    """A student, a teacher whose weights are larger, tokens, plan, and what the teacher finds likely."""
    random = np.random.default_rng(0)
    place = tmp_path / "tokens/chat/00000"
    rows = []
    for number in range(40):
        answer = random.integers(60, 200, int(random.integers(3, 12))).tolist()
        spans = turns(("user", 3), ("assistant", len(answer)))
        ids = [30, 31, *random.integers(60, 200, 3).tolist(), 32, 33, 34, *answer, 35]
        made = {"row": number, "ids": ids, "spans": spans, "extra": ""}
        rows.append({**made, "identity": number.to_bytes(8, "big") * 2})
    written = write_tokens(place, 258, rows)
    counts = {**written, "kind": "conversation", "rows": 40, "dropped": {}, "source": "chat", "split": "train"}
    (place / "counts.json").write_text(json.dumps(counts))
    score(other_weights(tiny_model, tmp_path / "teacher"), tiny_model, place, tmp_path / "reference/chat/00000")
    plan = Packed(tmp_path / "tokens", tmp_path / "plan", sequence_length=64, global_batch=4).output
    found = {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": plan, "reference": tmp_path / "reference"}
    return found


def score(teacher: Path, student: Path, tokens: Path, output: Path) -> None:
    output.mkdir(parents=True)
    given = {"model": teacher, "tokens": tokens, "tokenizer": student}
    config = ScoreConfig(precision="fp32", top_k=K)
    SCORE.run(config, given, output, Work(output.parent / "w", Runtime(device="cpu")))


def test_the_loss_is_the_divergence_from_the_teachers_likeliest_tokens(inputs: dict[str, Path]) -> None:
    bins = PackedBins(inputs["tokens"], inputs["plan"], reference=inputs["reference"])
    batch = distillation.prepare(collate([bins[0], bins[1]], pad_to_multiple=64))
    student = load_network(inputs["model"], "fp32", "cpu", packed=True)
    options = distillation.DistillationOptions(divergence=0.7, cross_entropy=0.4)
    with torch.no_grad():
        found = distillation.loss(student, options, batch)(batch)
    teacher = AutoModelForCausalLM.from_pretrained(inputs["plan"].parent / "teacher", attn_implementation="eager")
    plain = AutoModelForCausalLM.from_pretrained(inputs["model"], attn_implementation="eager")
    divergence = cross_entropy = whole = 0.0
    for packed in (bins[0], bins[1]):
        ends = np.cumsum(packed.lengths)[:-1]
        for ids, labels in zip(np.split(packed.ids, ends), np.split(packed.labels, ends), strict=True):
            with torch.no_grad():
                given = torch.from_numpy(ids.astype(np.int64))[None]
                p, q = (model(given).logits[0].double().softmax(-1) for model in (teacher, plain))
            for at in np.flatnonzero(labels >= 0):
                ours, theirs = q[at - 1], p[at - 1]
                kept = theirs.topk(K).indices
                a, b = theirs[kept], ours[kept]
                rest = (1 - a.sum()) * ((1 - a.sum()) / (1 - b.sum())).log()
                divergence += float((a * (a / b).log()).sum() + rest)
                whole += float((theirs * (theirs / ours).log()).sum())
                cross_entropy -= float(ours[ids[at]].log())
    assert found["divergence"].item() == pytest.approx(divergence, rel=2e-2)  # the cache is 16 bits wide
    assert found["cross_entropy"].item() == pytest.approx(cross_entropy, rel=1e-4)
    assert found["loss"].item() == pytest.approx(0.7 * divergence + 0.4 * cross_entropy, rel=1e-2)
    assert divergence < whole


def test_the_student_comes_nearer_to_the_teacher(tmp_path: Path, inputs: dict[str, Path]) -> None:
    (tmp_path / "output").mkdir()
    config = {"objective": "distillation", "method": "full", "learning_rate": 1e-2, "precision": "fp32"}
    work = Work(tmp_path / "work", Runtime(device="cpu"))
    TRAIN.run(TrainConfig.model_validate({**config, "max_steps": 16}), inputs, tmp_path / "output", work)
    steps = [json.loads(line) for line in (tmp_path / "output/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["divergence"] < 0.6 * steps[0]["divergence"]


def test_what_is_no_token_is_not_learned_from_a_teacher_padded_to_more(
    tmp_path: Path, inputs: dict[str, Path], tiny_model: Path
) -> None:
    place = tmp_path / "tokens/chat/00000"
    padded = other_weights(tiny_model, tmp_path / "padded", tokens=320)
    teacher = AutoModelForCausalLM.from_pretrained(padded)
    with torch.no_grad():  # rows that nothing has trained may be as likely as any
        teacher.get_output_embeddings().weight[258:] = 1.5 * teacher.get_output_embeddings().weight[60:122]
    teacher.save_pretrained(padded)
    score(padded, tiny_model, place, tmp_path / "by_padded/chat/00000")
    teacher.resize_token_embeddings(258)
    teacher.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut/tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    score(tmp_path / "cut", tiny_model, place, tmp_path / "by_cut/chat/00000")
    by_padded, by_cut = (read_table(tmp_path / name / "chat/00000/top.arrow") for name in ("by_padded", "by_cut"))
    assert by_padded == by_cut
    (tmp_path / "output").mkdir()
    config = {"objective": "distillation", "precision": "fp32", "max_steps": 1, "lora": {"rank": 4}}
    given = {**inputs, "reference": tmp_path / "by_padded"}
    TRAIN.run(
        TrainConfig.model_validate(config), given, tmp_path / "output", Work(tmp_path / "w", Runtime(device="cpu"))
    )


def test_what_a_teacher_says_is_kept_for_every_student_with_its_tokens() -> None:
    def trees(student: str) -> dict[str, Tree]:
        model = Tree((File("model.safetensors", 1, student * 64), File("tokenizer.json", 1, "5" * 64)))
        teacher = Tree((File("model.safetensors", 1, "7" * 64),))
        return {"model": model, "teacher": teacher, "tokens": Tree((File("a/00000/tokens.arrow", 1, "3" * 64),))}

    with_teacher = [parts(ScoreConfig(top_k=K), trees(student)) for student in "12"]
    assert with_teacher[0] == with_teacher[1]
    without = [parts(ScoreConfig(), trees(student)) for student in "12"]
    assert without[0] != without[1], "what the model before training gives is its own"


def test_a_teacher_with_other_tokens_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    document: Any = json.loads((inputs["model"] / "tokenizer.json").read_text())
    words = document["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"another tokenizer than fetch.model: 'a' is token"):
        score(other, inputs["model"], inputs["tokens"] / "chat/00000", tmp_path / "out")


RECIPE = """
name: taught
fetch: {{model: {{path: m}}, data: {{rows: {{files: rows.jsonl}}}}{fetch}}}
convert: {{format: messages}}
train: {{objective: {objective}}}
{more}
"""


def test_what_is_likely_is_written_piece_by_piece(
    inputs: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inputs["reference"] / "chat/00000/top.arrow"
    monkeypatch.setattr("stages.scoring.LIKELY", 40 * K)
    score(tmp_path / "teacher", tiny_model, inputs["tokens"] / "chat/00000", tmp_path / "again")
    table, again = read_table(whole), read_table(tmp_path / "again/top.arrow")
    assert again.column(0).num_chunks > table.column(0).num_chunks == 1
    assert again.combine_chunks().column_names == table.column_names and len(again) == len(table)
    for name in table.column_names:
        for one, other in zip(again[name].to_pylist(), table[name].to_pylist(), strict=True):
            assert one == pytest.approx(other, abs=1e-2)


def test_more_likely_tokens_than_the_teacher_knows_are_refused(
    inputs: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.objectives.test_distillation.K", 1024)
    with pytest.raises(UserError, match=r"score.top_k is 1024, but the teacher knows \d+ tokens: set it to at most"):
        score(tmp_path / "teacher", tiny_model, inputs["tokens"] / "chat/00000", tmp_path / "again")


@pytest.mark.parametrize(
    ("objective", "fetch", "more", "told"),
    [
        ("distillation", "", "", r"say how many, e.g. `score.top_k: 32`"),
        ("sft", ", teacher: {path: t}", "", r"sft learns from no teacher: take it out"),
        ("sft", "", "score: {top_k: 8}", r"sft learns from no teacher: take it out"),
    ],
)
def test_a_teacher_and_its_objective_go_together(objective: str, fetch: str, more: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        loads(RECIPE.format(objective=objective, fetch=fetch, more=more), "taught.yaml")
