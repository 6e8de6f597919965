"""Adapters of a mixture's experts by grouped products: what PEFT computes, without a copy of the experts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from stages.train import Lora, adapters, lora_experts
from tests.stages import tiny
from tests.stages.test_train_architectures import TRAINED

NAMES = ["Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3", "Olmoe", "GraniteMoe", "Phimoe", "Glm4Moe"]
DEFAULT = ("Qwen3Moe", "GptOss")


def adapted(folder: Path, name: str, device: str = "cpu", dtype: str = "float32", rank: int = 4, **sizes: Any) -> Any:
    """A random mixture with random adapters on everything, B too."""
    torch.set_num_threads(1)
    tiny.save(folder, f"{name}Config", dtype=dtype, **{**TRAINED[name], **sizes})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    # In one dtype, as training holds what it adapts.
    made = adapters.adapt(model, Lora(rank=rank, experts=True), folder).to(device, getattr(torch, dtype))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return made


def step(model: Any, ids: Tensor) -> list[Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    weights = [p for p in model.parameters() if p.requires_grad]
    return [logits, *torch.autograd.grad(loss, weights, materialize_grads=True)]


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.full) for n in NAMES])
def test_logits_and_gradients_are_pefts(tmp_path: Path, name: str) -> None:
    model = adapted(tmp_path, name)
    ids = torch.randint(0, tiny.VOCABULARY, (1, 50))
    expected = step(model, ids)
    found = lora_experts.quicken(model)
    assert found >= 1
    for one, other in zip(step(model, ids), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * max(1.0, float(other.abs().max())))
    with model.disable_adapter():
        off = model(input_ids=ids).logits
    assert (off - expected[0]).abs().max() > 1e-2, "the adapter counts, and can be switched off"


def test_no_copy_of_the_experts_is_kept(tmp_path: Path) -> None:
    sizes = {"num_experts": 32, "moe_intermediate_size": 64, "hidden_size": 64}
    model = adapted(tmp_path, "Qwen3Moe", **sizes)
    ids = torch.randint(0, tiny.VOCABULARY, (1, 16))
    experts = max(p.numel() for p in model.parameters()) * 4

    def largest(model: Any) -> int:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: list[int] = [0]

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen.append(0 if storage.data_ptr() in own else storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=ids, use_cache=False).logits.sum()
        return max(seen)

    before = largest(copy.deepcopy(model))
    lora_experts.quicken(model)
    assert before >= experts > 4 * largest(model)


def test_what_it_does_not_compute_exactly_stays_pefts(tmp_path: Path) -> None:
    model = adapted(tmp_path, "Qwen3Moe")
    model.config._experts_implementation = "eager"
    assert lora_experts.quicken(model) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_on_a_gpu_in_16_bits(tmp_path: Path, name: str) -> None:
    model = adapted(tmp_path, name, "cuda", "bfloat16", rank=8)
    ids = torch.randint(0, tiny.VOCABULARY, (1, 50), device="cuda")
    exact = step(copy.deepcopy(model).float(), ids)
    expected = step(model, ids)
    assert lora_experts.quicken(model) >= 1
    for found, pefts, true in zip(step(model, ids), expected, exact, strict=True):
        assert (found - true).norm() <= 1.5 * (pefts - true).norm() + 0.02 * true.norm() + 1e-3


@pytest.mark.parametrize("name", ["Qwen3Moe", pytest.param("DeepseekV3", marks=pytest.mark.full)])
def test_a_training_in_16_bits_holds_them_so(tmp_path: Path, name: str) -> None:
    from stages.train import TrainConfig, model, speed

    folder = tiny.save(tmp_path, f"{name}Config", dtype="bfloat16", **TRAINED[name])
    config = TrainConfig.model_validate({"lora": {"rank": 4, "experts": True}})
    made = model.ready(model.load(folder, config, "cpu", True), config, folder, "cpu", lambda: [])
    done = speed.hold(made, config)
    assert done["grouped_experts"] >= 1 and done["fused_adapters"] >= 4
    boundaries = torch.tensor([0, 30], dtype=torch.int32)
    logits = made(input_ids=torch.arange(30)[None], cu_seq_lens_q=boundaries, use_cache=False).logits
    trained = [p for p in made.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logits.float().square().mean(), trained, materialize_grads=True)
    assert all(each.isfinite().all() for each in gradients) and any(each.any() for each in gradients)
