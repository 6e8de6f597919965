"""What the figures of a step mean: FLOPs against torch's own count, a held-out loss against the training loss."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from stages.errors import UserError
from stages.runtime import Runtime
from stages.stage import Work
from stages.tables import read_table, tokens_schema, write_table
from stages.train import STAGE, TrainConfig
from stages.train import model as network
from stages.train import trackers as tracking
from stages.train.metrics import Counted, counted_weights, model_flops, peak_flops
from stages.train.trainer import PackedTrainer
from tests.stages import tiny


@pytest.mark.parametrize("frozen", [False, True])
def test_model_flops_are_what_torch_counts(tmp_path: Path, frozen: bool) -> None:
    """Eager attention counts all pairs of tokens, the formula those that are seen: half of them."""
    folder = tiny.llama(tmp_path / "model", hidden_size=64, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.get_input_embeddings().weight.requires_grad_(False)
    if frozen:
        model.requires_grad_(False)
        model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    tokens = 48
    ids = torch.arange(3, 3 + tokens)[None]
    counter = FlopCounterMode(display=False)
    with counter:
        model(ids, labels=ids).loss.backward()
    attention = model_flops(model.config, Counted(0, 0, False), [tokens], 0)
    exact = model_flops(model.config, counted_weights(model), [tokens], tokens) + attention
    # What stands before the first trained weight takes no gradient: a layer's norms and projections at most.
    assert counter.get_total_flops() == pytest.approx(exact, rel=0.12 if frozen else 0.01)


def test_weights_are_counted_once_and_as_what_they_stand_for(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model", hidden_size=64, intermediate_size=128)

    def count(**settings: Any) -> Counted:
        lora = {"rank": 4, **settings.pop("lora", {})}
        config = TrainConfig.model_validate({"precision": "fp32", "lora": lora, **settings})
        return counted_weights(network.ready(network.load(folder, config, "cpu"), config, folder, "cpu", list))

    plain = count()
    assert count(quantize="nf4") == count(quantize="int8") == plain and not plain.head_trains
    assert count(lora={"modules_to_save": ["embed_tokens", "lm_head"]}) == plain._replace(head_trains=True)


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", 65e12),
        ("NVIDIA RTX A6000", 155e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None),
    ],
)
def test_a_card_is_known_by_its_whole_name(card: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    assert peak_flops("cuda", None) == peak


def test_the_loss_of_held_out_rows_is_the_training_loss_of_the_same_rows(tmp_path: Path) -> None:
    rows = tiny.documents(24)
    inputs = {"model": tiny.llama(tmp_path / "model"), **tiny.plan(tmp_path, rows, global_batch=len(rows))}
    for name in ("documents", "bins"):
        shutil.copyfile(inputs["plan"] / f"{name}.arrow", inputs["plan"] / f"heldout_{name}.arrow")
    (tokens,) = inputs["tokens"].rglob("tokens.arrow")
    ids = read_table(tokens)["ids"].to_pylist()
    copied = ({"ids": ids[row]} for row in read_table(inputs["plan"] / "documents.arrow")["row"].to_pylist())
    write_table(inputs["plan"] / "heldout_tokens.arrow", tokens_schema(tiny.VOCABULARY), copied)
    config = {"precision": "fp32", "learning_rate": 1e-9, "max_steps": 1, "evaluate_every": 1}
    (tmp_path / "output").mkdir()
    work = Work(tmp_path / "work", Runtime(device="cpu"))
    facts = STAGE.run(TrainConfig.model_validate(config), inputs, tmp_path / "output", work)
    line = json.loads((tmp_path / "output" / "metrics.jsonl").read_text())
    assert facts["heldout"]["looks"][0]["loss"] == pytest.approx(line["loss"], rel=1e-5)


class NoWaiting(TorchDispatchMode):
    """Refuses to make a Python number of a tensor, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a step waits for a number")
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.full)])
def test_no_step_waits_for_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """From its batch to its figures; but for the optimizer's own step, which counts on the CPU wherever it runs."""
    with NoWaiting(), pytest.raises(AssertionError, match="a step waits"):
        torch.ones(()).item()
    watched: list[str] = []

    def watch(name: str) -> None:
        plain: Callable[..., Any] = getattr(PackedTrainer, name)

        def watching(self: Any, *given: Any, **more: Any) -> Any:
            if self.state.global_step == 0:  # when whatever is new is set up
                return plain(self, *given, **more)
            watched.append(name)
            with NoWaiting():
                return plain(self, *given, **more)

        monkeypatch.setattr(PackedTrainer, name, watching)

    for name in ("training_step", "_clip_grad_norm", "_maybe_log_save_evaluate"):
        watch(name)
    inputs = {"model": tiny.llama(tmp_path / "model"), **tiny.plan(tmp_path, tiny.documents(24))}
    (tmp_path / "output").mkdir()
    config = TrainConfig.model_validate({"precision": "fp32", "method": method, "max_steps": 3})
    STAGE.run(config, inputs, tmp_path / "output", Work(tmp_path / "work", Runtime.model_validate({"micro_batch": 2})))
    assert watched[:2] == ["_maybe_log_save_evaluate", "training_step"] and watched.count("_clip_grad_norm") == 2


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracker wandb, and it is not installed: pip install 'regrow\[wandb\]'"):
        tracking.chosen(Runtime(trackers=("wandb",)), "0")
    assert tracking.chosen(Runtime(), "0") == ()
    assert Runtime.model_validate({"trackers": "mlflow, wandb"}).trackers == ("mlflow", "wandb")
