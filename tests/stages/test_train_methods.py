"""Whole trainings by every method on a tiny model, each merged, and what is particular to each."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import merge
from stages.errors import UserError
from stages.identity import tree_of
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.train import STAGE, TrainConfig, between, model, optimizers
from tests.stages import tiny
from tests.stages.test_merge import make_model

ROWS = tiny.documents(26)
SMALL: dict[str, Any] = {"lora": {"rank": 4}, "learning_rate": 2e-2, "max_steps": 4, "precision": "fp32"}
FULL: dict[str, Any] = {"method": "full", "learning_rate": 1e-2, "max_steps": 4, "precision": "fp32"}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("train")
    torch.set_num_threads(1)
    return {"model": make_model(folder / "model"), **tiny.plan(folder, ROWS, heldout=6)}


def train(folder: Path, inputs: dict[str, Path], config: dict[str, Any], tell: Any = None, **runtime: Any) -> Facts:
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    more = {"tell": tell} if tell else {}
    work = Work(folder / "work", Runtime.model_validate({"device": "cpu", **runtime}), **more)
    return STAGE.run(TrainConfig.model_validate(config), inputs, output, work)


def merged(folder: Path, inputs: dict[str, Path]) -> tuple[Path, Facts]:
    output = folder / "merged"
    output.mkdir()
    given = {"model": inputs["model"], "trained": folder / "output", "templates": folder / "output"}
    return output, merge.STAGE.run(merge.MergeConfig(), given, output, Work(folder / "w", Runtime(device="cpu")))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "output/metrics.jsonl").read_text().splitlines()]


ADAPTERS: dict[str, dict[str, Any]] = {
    "pissa": {"lora": {"rank": 4, "init": "pissa"}},
    "olora": {"lora": {"rank": 4, "init": "olora", "rslora": True}},
    "eva": {"lora": {"rank": 4, "init": "eva"}},
    "dora": {"lora": {"rank": 4, "dora": True}},
    "nf4": {"quantize": "nf4", "precision": "bf16"},
    "loftq": {"quantize": "nf4", "lora": {"rank": 4, "init": "loftq"}, "precision": "bf16"},
    "int8": {"quantize": "int8", "precision": "bf16"},
    "relora": {"lora": {"rank": 4, "restart_every": 2, "restart_warmup": 0}, "precision": "bf16"},
    "saved": {"lora": {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "neftune": {"neftune_alpha": 5},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_learns_and_merges(tmp_path: Path, inputs: dict[str, Path], kind: str) -> None:
    train(tmp_path, inputs, {**SMALL, **ADAPTERS[kind]})
    found = losses(tmp_path)
    assert found[-1] < 0.95 * found[0], found
    output, facts = merged(tmp_path, inputs)
    assert facts["changed_tensors"] and "changed nothing" not in facts.get("warning", "")
    before, after = weights(inputs["model"]), weights(output)
    embeddings = torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert embeddings == (kind != "saved")
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])


TIED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}, "embed_tokens"),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, "wte"),
    "gpt2, by its head": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, "lm_head"),
    "gpt_neox": ("GPTNeoXConfig", {"tie_word_embeddings": True}, "embed_in"),
}


@pytest.mark.parametrize("restart_every", [None, 2])
@pytest.mark.parametrize("kind", TIED)
def test_saved_modules_of_a_tied_model_stay_tied(
    tmp_path: Path, inputs: dict[str, Path], kind: str, restart_every: int | None
) -> None:
    config_name, sizes, name = TIED[kind]
    tied = {**inputs, "model": make_model(tmp_path / "tied", config_name, **sizes)}
    lora = {"rank": 4, "modules_to_save": [name], "restart_every": restart_every}
    train(tmp_path, tied, {**SMALL, "lora": lora})
    output, _ = merged(tmp_path, tied)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tied["model"], output))
    words = after.get_input_embeddings().weight
    assert after.get_output_embeddings().weight is words
    assert not torch.equal(before.get_input_embeddings().weight, words)
    assert weights(output).keys() == weights(tied["model"]).keys()


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_train_their_rows_and_no_other(tmp_path: Path, inputs: dict[str, Path], tied: bool) -> None:
    given = {**inputs, "model": make_model(tmp_path / "model", tie_word_embeddings=tied)}
    train(tmp_path, given, {**SMALL, "lora": {"rank": 4, "new_tokens": ["%", "&"]}})  # the alphabet's 4th and 5th
    output, _ = merged(tmp_path, given)
    before, after = weights(given["model"]), weights(output)
    for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        moved = (before[name] != after[name]).any(dim=1).nonzero()[:, 0].tolist()
        assert moved == [4, 5], name
    with pytest.raises(UserError, match=r"no token '<tool>': add it with fetch\.model\.new_tokens"):
        train(tmp_path / "wrong", given, {**SMALL, "lora": {"rank": 4, "new_tokens": ["<tool>"]}})


def test_experts_train_and_merge(tmp_path: Path, inputs: dict[str, Path]) -> None:
    mixture = {**inputs, "model": make_model(tmp_path / "model", "MixtralConfig", **MOE)}
    train(tmp_path, mixture, {**SMALL, "lora": {"rank": 4, "experts": True}})
    output, _ = merged(tmp_path, mixture)
    before, after = weights(mixture["model"]), weights(output)
    moved = [name for name in before if "experts" in name and not torch.equal(before[name], after[name])]
    assert moved and len(moved) == len([name for name in before if "experts" in name])


# ---- quantized ----


def forward(adapted: Any) -> torch.Tensor:
    ids = torch.tensor([ROWS[0]])
    boundaries = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    known = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 32, "max_length_k": 32}
    with torch.autocast("cpu", torch.bfloat16):
        loss: torch.Tensor = adapted(input_ids=ids, labels=ids, **known).loss
    return loss


def gradients(adapted: Any) -> dict[str, torch.Tensor]:
    adapted.train().zero_grad()
    forward(adapted).backward()
    return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_over_quantized_weights_are_those_over_what_they_hold(inputs: dict[str, Path], kind: str) -> None:
    """Also after a forward pass in eval mode without gradients, after which bitsandbytes on CPUs with AVX512-BF16 gave
    zeros."""
    config = TrainConfig.model_validate({**SMALL, "quantize": kind, "precision": "bf16"})

    def make() -> Any:
        torch.manual_seed(0)
        adapted = model.ready(model.load(inputs["model"], config, "cpu"), config, inputs["model"], "cpu", list)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return adapted

    quantized = make()
    first = gradients(quantized)
    with torch.no_grad():
        forward(quantized.eval())
    again = gradients(quantized)
    plain = TrainConfig.model_validate({**SMALL, "precision": "bf16"})
    torch.manual_seed(0)
    reference = model.ready(model.load(inputs["model"], plain, "cpu"), plain, inputs["model"], "cpu", list)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
                reference.get_submodule(name).weight.copy_(dequantize_module_weight(module))
        for name, parameter in quantized.named_parameters():
            if parameter.requires_grad:
                reference.get_parameter(name).copy_(parameter)
    expected = gradients(reference)
    for name, gradient in first.items():
        assert gradient.any() and torch.equal(gradient, again[name]), name
        likeness = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert likeness > (0.995 if kind == "nf4" else 0.95), (name, likeness)


@pytest.mark.parametrize("kind", ["llama", "GPT2Config"])
def test_loftq_starts_nearer_to_the_model_than_its_quantized_weights(
    tmp_path: Path, inputs: dict[str, Path], kind: str
) -> None:
    """Those of GPT-2 lie the other way about in its files."""
    folder = inputs["model"] if kind == "llama" else tiny.save(tmp_path / "gpt", kind, hidden_size=64, n_inner=128)
    base = AutoModelForCausalLM.from_pretrained(folder)

    def distance(**lora: Any) -> float:
        config = TrainConfig.model_validate({**SMALL, "lora": {"rank": 8, **lora}, "quantize": "nf4"})
        adapted = model.ready(model.load(folder, config, "cpu"), config, folder, "cpu", list)
        total = 0.0
        for name, module in adapted.named_modules():
            if hasattr(module, "lora_A"):
                kept = dequantize_module_weight(module.get_base_layer()).float()
                whole = base.get_parameter(f"{name.removeprefix('base_model.model.')}.weight")
                whole = whole.T if kind == "GPT2Config" else whole
                total += (whole - kept - module.get_delta_weight("default")).square().sum().item()
        return total

    assert distance(init="loftq") < 0.75 * distance()


def test_a_model_that_came_quantized_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    folder = Path(shutil.copytree(inputs["model"], tmp_path / "model"))
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"quantized already \(gptq\)"):
        train(tmp_path, {**inputs, "model": folder}, SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"precision": "fp16"}, {"quantize": "nf4"}, {"quantize": "int8"}], ids=str)
def test_it_learns_and_merges_on_a_gpu(tmp_path: Path, inputs: dict[str, Path], changes: dict[str, Any]) -> None:
    train(tmp_path, inputs, {**SMALL, "precision": "bf16", "max_steps": 8, **changes}, device="cuda")
    assert losses(tmp_path)[-1] < 0.9 * losses(tmp_path)[0]
    _, facts = merged(tmp_path, inputs)
    assert facts["changed_tensors"]


# ---- frozen parts ----


@pytest.mark.parametrize(
    ("full", "trains"),
    [
        ({"only": ["mlp"]}, "mlp"),
        ({"only": ["re:.*layers\\.1\\..*"], "freeze": ["*norm*"]}, "layers.1."),
        ({"freeze": ["layers", "norm", "lm_head"]}, "embed_tokens"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_keep_every_bit(
    tmp_path: Path,
    inputs: dict[str, Path],
    full: dict[str, Any],
    trains: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stages.arithmetic.cpu_has_bf16", lambda: True)  # as on a GPU
    train(tmp_path, inputs, {**FULL, "full": full, "precision": precision})
    before, after = weights(inputs["model"]), weights(tmp_path / "output/weights")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if trains in name and not ("freeze" in full and "norm" in name)}


def test_a_pattern_that_names_no_weight_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"full.freeze: no weight is called 'embed_token': did you mean 'embed_tokens'"):
        train(tmp_path, inputs, {**FULL, "full": {"freeze": ["embed_token"]}})


# ---- between steps ----


def test_the_average_is_the_plain_formulas(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Against the weights after every step, which trainings of 1, 2 and 3 steps at a constant rate leave."""
    config = {**FULL, "schedule": "constant", "warmup": 0}
    expected = weights(inputs["model"])
    for steps in (1, 2, 3):
        train(tmp_path / str(steps), inputs, {**config, "max_steps": steps})
        now = weights(tmp_path / str(steps) / "output/weights")
        expected = {name: 0.8 * expected[name] + 0.2 * now[name] for name in expected}
    train(tmp_path / "ema", inputs, {**config, "max_steps": 3, "ema": 0.8})
    found = weights(tmp_path / "ema/output/weights")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
def test_an_adapter_restarts_as_it_started(inputs: dict[str, Path], start: str) -> None:
    config = TrainConfig.model_validate({**SMALL, "lora": {"rank": 4, "restart_every": 2, "init": start}})
    torch.manual_seed(0)
    adapted = model.ready(model.load(inputs["model"], config, "cpu"), config, inputs["model"], "cpu", list)
    parts = between.make(adapted, config, optimizers.make(adapted, config), 4, None, lambda *_: None).parts

    def sizes() -> list[float]:
        named = [*adapted.named_parameters()]
        return [
            float(torch.cat([p.detach().flatten() for n, p in named if side in n]).std())
            for side in ("lora_A", "lora_B")
        ]

    before = sizes()
    parts["restarts"].after(2)
    assert sizes() == pytest.approx(before, rel=0.2)


def test_lisa_trains_few_layers_at_a_time(tmp_path: Path, inputs: dict[str, Path]) -> None:
    config = {**FULL, "full": {"lisa": {"layers": 1, "every": 2}}, "max_steps": 2}
    train(tmp_path, inputs, config)
    before, after = weights(inputs["model"]), weights(tmp_path / "output/weights")
    moved = {name.split(".")[2] for name in before if ".layers." in name and not torch.equal(before[name], after[name])}
    assert len(moved) == 1
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_a_schedule_free_run_writes_the_averaged_weights(tmp_path: Path, inputs: dict[str, Path]) -> None:
    # With lr_weight 0 and r 0 after one step x = z, which is what plain AdamW does in its first step.
    config = {**FULL, "optimizer": "schedule_free_adamw", "schedule": "constant", "max_steps": 4, "evaluate_every": 4}
    facts = train(tmp_path, inputs, config)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "output/weights", dtype=torch.float32)
    assert facts["heldout"]["looks"][-1]["loss"] == pytest.approx(heldout_loss(network), rel=1e-4)  # type: ignore[index,call-overload]


def heldout_loss(network: Any) -> float:
    total = count = 0.0
    for row in ROWS[-6:]:
        ids = torch.tensor([row])
        with torch.no_grad():
            mean = network(ids, labels=torch.where(torch.arange(len(row)) < 2, -100, ids)).loss
        total, count = total + float(mean) * (len(row) - 2), count + len(row) - 2
    return total / count


def test_the_best_weights_are_kept_and_training_stops_when_it_gets_worse(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    config = {**FULL, "learning_rate": 0.3, "schedule": "constant", "max_steps": 40}
    facts: Any = train(tmp_path, inputs, {**config, "evaluate_every": 1, "patience": 3, "keep": "best"})
    record = facts["heldout"]
    looks = [look["loss"] for look in record["looks"]]
    assert facts["steps"] == len(looks) < 40 and record["stopped_early"]
    assert len(looks) - 1 - looks.index(min(looks)) == 3
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "output/weights", dtype=torch.float32)
    assert heldout_loss(network) == pytest.approx(min(looks), rel=1e-4)
    assert json.loads((tmp_path / "output/train.json").read_text())["heldout"] == record


def test_a_run_that_stopped_early_is_over_for_whoever_goes_on(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Killed after its last step, with a checkpoint as late as there is one."""
    config = {**SMALL, "learning_rate": 0.5, "schedule": "constant", "max_steps": 30, "evaluate_every": 1}
    once: Any = train(tmp_path, inputs, {**config, "patience": 1}, save_seconds=1e-9)
    made = tree_of(tmp_path / "output")
    assert once["steps"] < 30 and once["heldout"]["stopped_early"]
    again: Any = train(tmp_path, inputs, {**config, "patience": 1}, save_seconds=1e-9)
    assert 0 < again["resumed_at_step"] < once["steps"]
    assert again["heldout"] == once["heldout"]
    assert tree_of(tmp_path / "output") == made


def test_looking_needs_rows_that_are_held_out(tmp_path: Path, inputs: dict[str, Path]) -> None:
    without = {**inputs, **tiny.plan(tmp_path, ROWS)}
    with pytest.raises(UserError, match=r"no rows out: set pack\.heldout_fraction, or `split: heldout` on a source"):
        train(tmp_path, without, {**SMALL, "evaluate_every": 1})


STATEFUL: dict[str, dict[str, Any]] = {
    "ema": {**SMALL, "ema": 0.8},
    "relora": {**SMALL, "lora": {"rank": 4, "restart_every": 2, "restart_warmup": 2}},
    "lisa": {**FULL, "full": {"lisa": {"layers": 1, "every": 2}}},
    "schedule_free": {**FULL, "optimizer": "schedule_free_adamw", "schedule": "constant"},
    "best": {**SMALL, "evaluate_every": 1, "keep": "best", "patience": 3, "neftune_alpha": 5},
    "pissa": {**SMALL, "lora": {"rank": 4, "init": "pissa"}},
    "halves": {**FULL, "precision": "bf16", "ema": 0.8, "evaluate_every": 1, "keep": "best"},
}


QUICK = ("relora",)
"""The one whose state has most in it; the full suite takes all."""


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.full) for k in STATEFUL])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, inputs: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.arithmetic.cpu_has_bf16", lambda: True)  # as on a GPU
    config = {**STATEFUL[kind], "max_steps": 6}
    train(tmp_path / "unbroken", inputs, config)

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, inputs, config, tell)
    assert stopped.value.code == 75
    with pytest.raises(SystemExit):
        train(tmp_path, inputs, config, tell)
    facts = train(tmp_path, inputs, config)
    assert 1 < facts["resumed_at_step"] < 6  # type: ignore[operator]
    assert tree_of(tmp_path / "output") == tree_of(tmp_path / "unbroken/output")
