"""A feed-forward layer with adapters as one operation is the layer as transformers and PEFT compute it."""

import copy
import os
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from stages.train import lora_linear, lora_mlp

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def adapted(kind: Any = LlamaMLP, config: Any = LlamaConfig, rank: int = 4, **settings: Any) -> Any:
    torch.manual_seed(0)
    layer = kind(config(hidden_size=32, intermediate_size=144, **settings))
    targets = ["gate_proj", "up_proj", "down_proj"]
    return get_peft_model(
        nn.Sequential(layer), LoraConfig(r=rank, lora_alpha=10, target_modules=targets, init_lora_weights=False)
    )


def outcome(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y.float() ** 2).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [4, 16, 48, 80])
def test_output_and_gradients_are_those_of_the_parts(device: str, rank: int) -> None:
    theirs = adapted(rank=rank).to(device)
    ours = copy.deepcopy(theirs)
    lora_linear.quicken(ours)
    assert lora_mlp.quicken(ours) == 1
    x = torch.randn(3, 7, 32, device=device)
    tolerance = 1e-4 if device == "cpu" else 1e-2  # Triton's float32 product is tf32
    for found, expected in zip(outcome(ours, x), outcome(theirs, x), strict=True):
        assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="no Triton")
@pytest.mark.parametrize(("rank", "rank_out"), [(4, 4), (16, 3), (5, 40), (70, 2)])
def test_the_kernels_are_the_plain_formula(rank: int, rank_out: int) -> None:
    from stages.kernels import swiglu

    both, d_out, reduced = torch.randn(170, 300), torch.randn(170, 150), torch.randn(170, 2 * rank)
    b = [torch.randn(150, rank, requires_grad=True) for _ in range(2)]
    reduced_out, a_out = torch.randn(170, rank_out), torch.randn(rank_out, 150)
    g = (both[:, :150] + reduced[:, :rank] @ b[0].T).requires_grad_()
    u = (both[:, 150:] + reduced[:, rank:] @ b[1].T).requires_grad_()
    expected = nn.functional.silu(g) * u
    near = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(swiglu.forward(both, reduced, b), expected.detach(), **near)
    by_g, by_u, *by_b = torch.autograd.grad(expected, (g, u, *b), d_out + reduced_out @ a_out)
    wanted = (torch.cat([by_g, by_u], dim=1), *by_b, reduced_out.T @ expected.detach())
    for found, other in zip(swiglu.backward(d_out, both, reduced, b, reduced_out, a_out), wanted, strict=True):
        torch.testing.assert_close(found, other, **near)


def test_the_trial_leaves_the_adapters_as_they_were() -> None:
    model = adapted(Qwen3MLP, Qwen3Config)
    lora_linear.quicken(model)
    before = [parameter.clone() for parameter in model.parameters()]
    assert lora_mlp.quicken(model) == 1
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_layers_of_a_kind_share_a_class_so_that_they_share_a_compiled_graph() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64)
    settings = LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(nn.Sequential(LlamaMLP(config), LlamaMLP(config)), settings)
    lora_linear.quicken(model)
    assert lora_mlp.quicken(model) == 2
    assert len({type(module) for module in model.modules() if hasattr(module, "gate_proj")}) == 1


def test_another_activation_is_left_alone() -> None:
    model = adapted(hidden_act="gelu")
    lora_linear.quicken(model)
    assert lora_mlp.quicken(model) == 0


@pytest.mark.parametrize("left_out", ["gate_proj", "down_proj"])
def test_where_not_all_three_are_adapted_nothing_changes(left_out: str) -> None:
    targets = {"gate_proj", "up_proj", "down_proj"} - {left_out}
    model = get_peft_model(adapted().unload(), LoraConfig(r=4, target_modules=targets))
    assert lora_linear.quicken(model) == 2
    assert lora_mlp.quicken(model) == 0


def test_down_may_have_another_rank() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=144)))
    targets = ["gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=4, rank_pattern={"down_proj": 7}, target_modules=targets, init_lora_weights=False)
    theirs: Any = get_peft_model(layer, settings)
    ours = copy.deepcopy(theirs)
    lora_linear.quicken(ours)
    assert lora_mlp.quicken(ours) == 1
    x = torch.randn(3, 7, 32)
    for found, expected in zip(outcome(ours, x), outcome(theirs, x), strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm()


def test_a_layer_of_another_form_is_found_out() -> None:
    class Other(LlamaMLP):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
            return out

    model = adapted(Other)
    lora_linear.quicken(model)
    assert lora_mlp.quicken(model) == 0


def test_a_layer_that_clamps_large_numbers_is_found_out() -> None:
    class Clamping(LlamaMLP):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_proj(x).clamp(max=7), self.up_proj(x).clamp(-7, 7)
            out: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
            return out

    model = adapted(Clamping)
    lora_linear.quicken(model)
    assert lora_mlp.quicken(model) == 0


def test_switched_off_adapters_are_off() -> None:
    model = adapted()
    x = torch.randn(3, 32)
    with model.disable_adapter():
        expected = model(x)
    lora_linear.quicken(model)
    assert lora_mlp.quicken(model) == 1
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_lie_together_and_merge(compiled: bool) -> None:
    model = adapted()
    x = torch.randn(3, 32)
    expected = model(x)
    lora_linear.quicken(model)
    assert lora_mlp.quicken(model) == 1
    layer = model.get_base_model()[0]
    places = [part.base_layer.weight.untyped_storage().data_ptr() for part in (layer.gate_proj, layer.up_proj)]
    assert places[0] == places[1]
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("laid_together", [True, False])
def test_the_operation_is_sound(laid_together: bool) -> None:
    x = torch.randn(3, 6, requires_grad=True)
    weights = [*torch.split(torch.randn(16, 6), 8), torch.randn(6, 8)]
    if not laid_together:
        weights = [weight.clone() for weight in weights]
    shapes = ((2, 6), (2, 6), (3, 8)), ((8, 2), (8, 2), (6, 3))
    a, b = ([torch.randn(*shape, requires_grad=True) for shape in side] for side in shapes)
    torch.library.opcheck(lora_mlp.lora_mlp, (x, weights, [], a, b, [0.5, 2.0, 1.0]))


def test_ranks_that_the_kernel_has_no_room_for_are_left_to_the_layers() -> None:
    for rank, fused in ((lora_mlp.MOST_RANK, 1), (lora_mlp.MOST_RANK + 1, 0)):
        model = adapted(rank=rank)
        assert lora_linear.quicken(model) == 3
        assert lora_mlp.quicken(model) == fused
