"""score: a token's log-probability is the one that the model gives it in its own row, and preferences learn from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.errors import UserError
from stages.runtime import Runtime
from stages.score import STAGE, ScoreConfig
from stages.stage import Work
from stages.tables import read_table, tokens_schema, write_table
from stages.train import STAGE as TRAIN
from stages.train import TrainConfig
from tests.stages import tiny
from tests.stages.packed import Packed, shard, turns

SIZES = (5, 1, 40, 17, 100, 2)


def rows() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, tiny.VOCABULARY, size).tolist() for size in SIZES]


def score(model: Path, tokens: Path, output: Path, **config: Any) -> list[list[float]]:
    output.mkdir(parents=True)
    work = Work(output / "w", Runtime(device="cpu"))
    settings = ScoreConfig.model_validate({"precision": "fp32", **config})
    STAGE.run(settings, {"model": model, "tokens": tokens}, output, work)
    return read_table(output / "log_probs.arrow")["log_probs"].to_pylist()


def test_log_probabilities_are_the_models_own_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.llama(tmp_path / "model")
    write_table(
        tmp_path / "tokens.arrow",
        tokens_schema(tiny.VOCABULARY),
        ({"ids": ids} for ids in rows()),
    )
    (tmp_path / "counts.json").write_text('{"kind": "preference"}')
    monkeypatch.setattr("stages.scoring.TOKENS", 50)
    found = score(folder, tmp_path, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for ids, log_probs in zip(rows(), found, strict=True):
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [0.0, *(logits[at - 1, ids[at]].item() for at in range(1, len(ids)))]
        assert log_probs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("config", "sizes"), [("GPT2Config", {"n_positions": 64}), ("OPTConfig", {})])
def test_of_a_row_beyond_learned_positions_the_beginning_is_scored(
    tmp_path: Path, config: str, sizes: dict[str, int]
) -> None:
    """Training refuses it, before that or after."""
    more = {"word_embed_proj_dim": 32, "ffn_dim": 64} if config == "OPTConfig" else {}
    folder = tiny.save(tmp_path / "model", config, max_position_embeddings=64, **sizes, **more)
    write_table(tmp_path / "tokens.arrow", tokens_schema(tiny.VOCABULARY), ({"ids": ids} for ids in rows()))
    (tmp_path / "counts.json").write_text('{"kind": "preference"}')
    found = score(folder, tmp_path, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for ids, log_probs in zip(rows(), found, strict=True):
        logits = model(torch.tensor([ids[:64]])).logits[0].log_softmax(-1)
        expected = [0.0, *(logits[at - 1, ids[at]].item() for at in range(1, len(ids[:64])))]
        assert log_probs == pytest.approx(expected + [0.0] * (len(ids) - len(expected)), abs=1e-4)


def test_rows_without_tokens_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.llama(tmp_path / "model")
    made = [[], rows()[2], [], [], rows()[3], []]
    write_table(tmp_path / "tokens.arrow", tokens_schema(tiny.VOCABULARY), ({"ids": ids} for ids in made))
    (tmp_path / "counts.json").write_text('{"kind": "preference"}')
    for most in (8, 8192):
        monkeypatch.setattr("stages.scoring.TOKENS", most)
        found = score(folder, tmp_path, tmp_path / f"out {most}")
        assert [len(each) for each in found] == [len(each) for each in made]
        assert all(value < 0 for each in found for value in each[1:])


def test_a_model_that_is_kept_is_of_the_precision_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one part to the next, which may be another run's in the same process."""
    monkeypatch.setattr("stages.arithmetic.cpu_has_bf16", lambda: True)
    folder = tiny.llama(tmp_path / "model")
    write_table(tmp_path / "tokens.arrow", tokens_schema(tiny.VOCABULARY), ({"ids": ids} for ids in rows()))
    (tmp_path / "counts.json").write_text('{"kind": "preference"}')
    exact, rounded, again = (
        score(folder, tmp_path, tmp_path / f"out {number}", precision=precision)
        for number, precision in enumerate(("fp32", "bf16", "fp32"))
    )
    assert rounded != exact == again


def test_rows_that_nothing_compares_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text('{"kind": "conversation"}')
    with pytest.raises(UserError, match=r"kind conversation.*convert.format preference or unpaired_preference"):
        score(tmp_path / "no model", tmp_path, tmp_path / "out")


def test_a_model_that_leaks_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "MambaConfig", state_size=8)
    tiny.plan(tmp_path, [[4, 5, 6]])
    (tmp_path / "tokens/chat/00000/counts.json").write_text('{"kind": "preference"}')
    with pytest.raises(UserError, match=r"score: mamba"):
        score(folder, tmp_path / "tokens/chat/00000", tmp_path / "out")


def judged(tokens: Path) -> None:
    """Pairs whose chosen answer counts up and whose rejected one counts down."""
    random = np.random.default_rng(1)
    made: list[dict[str, Any]] = []
    for number in range(40):
        start = int(random.integers(12, 50))
        for step in (1, -1):
            answer = [start + step * i for i in range(int(random.integers(3, 9)))]
            ids = [3, 4, start, 5, 6, *answer, 7]
            spans = turns(("user", 0), ("assistant", len(answer)))
            made.append(
                {
                    "row": number,
                    "ids": ids,
                    "spans": spans,
                    "identity": number.to_bytes(8, "big") * 2,
                    "extra": "",
                }
            )
    shard(tokens, "judged/00000", made, kind="preference", count=40)


def measures(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "cpo"])
def test_training_on_pairs_tells_them_apart(tmp_path: Path, objective: str) -> None:
    model = tiny.llama(tmp_path / "model")
    judged(tmp_path / "tokens")
    packed = Packed(tmp_path / "tokens", tmp_path / "plan", sequence_length=64, global_batch=4)
    inputs = {"model": model, "tokens": tmp_path / "tokens", "plan": packed.output}
    if objective == "dpo":
        found = score(model, tmp_path / "tokens" / "judged" / "00000", tmp_path / "reference" / "judged" / "00000")
        assert len(found) == 80
        inputs["reference"] = tmp_path / "reference"
    (tmp_path / "output").mkdir()
    config = {"objective": objective, "learning_rate": 1e-2, "precision": "fp32", "max_steps": 12, "lora": {"rank": 4}}
    work = Work(tmp_path / "work", Runtime.model_validate({"device": "cpu"}))
    TRAIN.run(TrainConfig.model_validate(config), inputs, tmp_path / "output", work)
    steps = measures(tmp_path / "output")
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert steps[-1]["accuracy"] > 0.8 >= steps[0]["accuracy"] >= 0.0
    assert steps[-1]["margin"] > steps[0]["margin"]
    if objective == "dpo":
        assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-3), "the reference is the model itself"


@pytest.mark.parametrize(("kind", "near"), [("nf4", 1e-4), pytest.param("int8", 1e-2, marks=pytest.mark.full)])
def test_the_reference_of_a_quantized_training_is_the_quantized_model(tmp_path: Path, kind: Any, near: float) -> None:
    model = tiny.llama(tmp_path / "model", hidden_size=64, head_dim=16)
    judged(tmp_path / "tokens")
    plan = Packed(tmp_path / "tokens", tmp_path / "plan", sequence_length=64, global_batch=4).output
    config = {"objective": "dpo", "precision": "fp32", "max_steps": 1, "lora": {"rank": 4}, "quantize": kind}

    tokens, reference, output = tmp_path / "tokens", tmp_path / "reference", tmp_path / "output"
    small = score(model, tokens / "judged/00000", reference / "judged/00000", quantize=kind)
    whole = score(model, tokens / "judged/00000", tmp_path / "whole")
    change = np.abs(np.concatenate(small) - np.concatenate(whole)).mean()
    assert 0.01 < change < 0.5, "quantized weights are others, and not quite others"
    output.mkdir()
    inputs = {"model": model, "tokens": tokens, "plan": plan, "reference": reference}
    TRAIN.run(TrainConfig.model_validate(config), inputs, output, Work(tmp_path / "work", Runtime(device="cpu")))
    # int8 also rounds activations, each batch's by their own size.
    assert measures(output)[0]["loss"] == pytest.approx(np.log(2), abs=near), "nothing has moved"


def test_an_objective_refuses_data_of_another_kind(tmp_path: Path) -> None:
    inputs = {"model": tiny.llama(tmp_path / "model"), **tiny.plan(tmp_path, tiny.documents(8))}
    with pytest.raises(UserError, match=r"orpo trains on rows of kind preference, .* kind conversation"):
        TRAIN.run(TrainConfig(objective="orpo"), inputs, tmp_path, Work(tmp_path / "work", Runtime(device="cpu")))
