"""The loss over picked tokens and in chunks is the loss that the model itself computes, whatever its head."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from packing.attention import implementation
from packing.collate import Bin, collate
from stages import lm_head, loss_head
from stages.errors import UserError
from stages.objectives import find, names, sft
from tests.stages import tiny

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HEADS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen3Config": {"tie_word_embeddings": True},
    "Phi3Config": {},
    "Gemma2Config": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3TextConfig": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "CohereConfig": {"logit_scale": 0.25},
    "GraniteConfig": {"logits_scaling": 4.0},
    "OlmoConfig": {},
    "MixtralConfig": EXPERTS,
    "Qwen3MoeConfig": EXPERTS,
    "GPTNeoXConfig": {},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "MiniCPM3Config": {"dim_model_base": 8, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8},
    "NanoChatConfig": {"final_logit_softcapping": 2.0},
    "HyperCLOVAXConfig": {"logits_scaling": 4.0},
    "ModernBertDecoderConfig": {"cls_token_id": 1, "sep_token_id": 2},
    "Llama4TextConfig": {"num_local_experts": 2, "intermediate_size_mlp": 48},
}
"""Architectures by their heads: plain, tied, capped, scaled, with a formula of their own, and without a decoder that
transformers finds."""


def packed() -> dict[str, Any]:
    """Three documents; some tokens of each train."""
    random = np.random.default_rng(0)
    lengths = np.array([17, 30, 9])
    ids = random.integers(3, tiny.VOCABULARY, lengths.sum())
    labels = np.where(random.random(len(ids)) < 0.4, ids, -100)
    labels[np.cumsum(lengths) - lengths] = -100
    return collate([Bin(ids, labels, lengths)])


def loss_of(model: Any, prepared: dict[str, Any], loss: Literal["nll", "dft"] = "nll") -> torch.Tensor:
    return sft.loss(model, sft.SftOptions(loss=loss), prepared)(prepared)["loss"]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation("cpu"))


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("chunk", [4096, 5])
def test_loss_and_gradients_are_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, chunk: int
) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", chunk)
    model = load(tiny.save(tmp_path, architecture, **HEADS[architecture]))
    batch = packed()
    trained = int((batch["labels"] != -100).sum())
    expected = model(**batch).loss * trained
    torch.autograd.backward(expected)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    prepared = sft.prepare(batch)
    assert len(prepared["targets"]) == trained
    found = loss_of(model, prepared)
    torch.autograd.backward(found)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "architecture", ["LlamaConfig", "HyperCLOVAXConfig", "ModernBertDecoderConfig", "Llama4TextConfig"]
)
def test_a_head_that_is_not_known_is_found_out(tmp_path: Path, architecture: str) -> None:
    # HyperCLOVA X multiplies by what Granite divides by, under the same name.
    model = load(tiny.save(tmp_path, architecture, **HEADS[architecture]))
    assert lm_head.find(model, sft.prepare(packed())).known == (architecture == "LlamaConfig")


@pytest.mark.parametrize("architecture", ["LlamaConfig", "Gemma2Config", "HyperCLOVAXConfig"])
def test_dft_weighs_each_token_by_its_probability(tmp_path: Path, architecture: str) -> None:
    model = load(tiny.save(tmp_path, architecture, **HEADS[architecture]))
    batch = packed()
    logits = model(**{n: v for n, v in batch.items() if n != "labels"}).logits[0, :-1].float()
    labels = batch["labels"][0, 1:]
    log_probs = logits.log_softmax(-1)[labels != -100].gather(1, labels[labels != -100][:, None])[:, 0]
    expected = -(log_probs.detach().exp() * log_probs).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    found = loss_of(model, sft.prepare(batch), "dft")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(found, parameters, allow_unused=True)
    for one, other in zip(ours, gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_an_adapter_counts(tmp_path: Path) -> None:
    model = get_peft_model(
        load(tiny.llama(tmp_path)), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    batch = packed()
    prepared = sft.prepare(batch)
    expected = model(**batch).loss.item() * len(prepared["targets"])
    assert loss_of(model, prepared).item() == pytest.approx(expected, rel=1e-5)
    with model.disable_adapter():
        assert loss_of(model, prepared).item() != pytest.approx(expected, rel=1e-3)


def test_nothing_to_train_costs_nothing(tmp_path: Path) -> None:
    model = load(tiny.llama(tmp_path))
    batch = packed()
    batch["labels"].fill_(-100)
    prepared = sft.prepare(batch)
    loss = loss_of(model, prepared)
    torch.autograd.backward(loss)
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_every_objective_in_the_folder_is_found() -> None:
    assert "sft" in names()
    for name in names():
        assert find(name).version >= 1


def test_an_unknown_objective_lists_the_choices() -> None:
    with pytest.raises(UserError, match=r"'stf'.*sft"):
        find("stf")
