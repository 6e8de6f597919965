"""Queries, keys and values with adapters as one operation are what transformers and PEFT compute in three layers."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, MistralConfig, OlmoConfig, Qwen2Config, Qwen3Config
from transformers.models.afmoe.modeling_afmoe import AfmoeAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.olmo.modeling_olmo import OlmoAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from stages.train import lora_attention, lora_linear, lora_stack

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaAttention, LlamaConfig, {}),
    "one head of keys": (LlamaAttention, LlamaConfig, {"num_key_value_heads": 1}),
    "as many heads of keys": (MistralAttention, MistralConfig, {"num_key_value_heads": 4}),
    "biases": (Qwen2Attention, Qwen2Config, {}),
    "normed queries and keys": (Qwen3Attention, Qwen3Config, {}),
}
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Net(nn.Module):
    """Attentions with what a decoder gives them."""

    def __init__(self, kind: Any, config: Any, count: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind(config, layer_idx=i) for i in range(count)])
        self.size = config.head_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * torch.linspace(0.1, 1, self.size, device=x.device)
        around = (angles.cos()[None].to(x.dtype), angles.sin()[None].to(x.dtype))
        for layer in self.layers:
            x = layer(hidden_states=x, position_embeddings=around, attention_mask=None)[0]
        return x


def adapted(kind: str = "llama", count: int = 1, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    layer, config, changes = KINDS[kind]
    net = Net(layer, config(**(SIZES | changes), attn_implementation="sdpa"), count)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # zeros would hide them
    options = {"r": 4, "lora_alpha": 10, "target_modules": TARGETS, "init_lora_weights": False, **settings}
    return get_peft_model(net, LoraConfig(**options)).to(dtype)


def quickened(model: Any) -> Any:
    ours = copy.deepcopy(model)
    lora_linear.quicken(ours)
    assert lora_attention.quicken(ours) == len(ours.get_base_model().layers)
    return ours


def outcome(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y.float() ** 2).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_alike(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_three_layers(device: str, kind: str) -> None:
    theirs = adapted(kind).to(device)
    x = torch.randn(2, 5, 32, device=device)
    assert_alike(outcome(quickened(theirs), x), outcome(theirs, x), 1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_in_16_bits_it_is_no_further_from_the_truth_than_the_parts(device: str) -> None:
    theirs = adapted("biases", dtype=torch.bfloat16, lora_alpha=8).to(device)
    x = torch.randn(2, 64, 32, device=device).bfloat16()
    exact = outcome(copy.deepcopy(theirs).double(), x.double())
    found, parts = outcome(quickened(theirs), x), outcome(theirs, x)
    for one, part, truth in zip(found, parts, exact, strict=True):
        assert (one - truth).norm() <= 1.3 * (part - truth).norm() + 1e-3 * truth.norm()


def test_layers_may_have_other_ranks_and_scales() -> None:
    theirs = adapted(rank_pattern={"k_proj": 3, "v_proj": 5}, alpha_pattern={"v_proj": 1})
    x = torch.randn(2, 5, 32)
    assert_alike(outcome(quickened(theirs), x), outcome(theirs, x), 1e-4)


@pytest.mark.parametrize("kind", ["llama", "biases"])
def test_compiled_and_recomputed_it_is_the_same(kind: str) -> None:
    theirs = adapted(kind)
    ours = quickened(theirs)
    x = torch.randn(1, 6, 32)
    expected = outcome(theirs, x)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_alike(outcome(compiled, x), expected, 1e-4)

    class Recomputing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return y

    for run in (Recomputing(ours), torch.compile(Recomputing(ours), backend="aot_eager", fullgraph=True)):
        ours.zero_grad()
        assert_alike(outcome(run, x), expected, 1e-4)


@pytest.mark.parametrize("laid_together", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_operation_is_sound(laid_together: bool, biased: bool) -> None:
    x = torch.randn(3, 6, requires_grad=True)
    sizes = [7, 2, 2]
    weights = list(torch.split(torch.randn(sum(sizes), 6), sizes))
    if not laid_together:
        weights = [weight.clone() for weight in weights]
    biases = [torch.randn(size) for size in sizes] if biased else []
    a = [torch.randn(rank, 6, requires_grad=True) for rank in (2, 3, 2)]
    b = [torch.randn(size, len(each), requires_grad=True) for size, each in zip(sizes, a, strict=True)]
    assert len(lora_stack.as_one(weights, [], a, b)) == (1 if laid_together else 3)
    torch.library.opcheck(lora_attention.lora_qkv, (x, weights, [], biases, a, b, [0.5, 1.0, 2.0]))


def test_weights_that_lie_together_are_still_three_and_merge() -> None:
    theirs = adapted(count=2)
    ours = quickened(theirs)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight)
    first = ours.get_base_model().layers[0]
    weights = [getattr(first, name).base_layer.weight for name in lora_attention.LAYERS]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    x = torch.randn(2, 5, 32)
    expected = theirs(x)
    for safe in (False, True):  # which puts other memory in place of the weights
        ours.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
        ours.unmerge_adapter()
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(ours)(x), expected, rtol=1e-4, atol=1e-4)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)


def test_switched_off_adapters_are_off() -> None:
    theirs = adapted("biases")
    ours = quickened(theirs)
    x = torch.randn(3, 2, 32)
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj"], ["o_proj"]])
def test_where_not_all_three_are_adapted_nothing_changes(targets: list[str]) -> None:
    model = adapted(target_modules=targets)
    assert lora_linear.quicken(model) == len(targets)
    assert lora_attention.quicken(model) == 0


def test_an_attention_that_does_more_with_its_input_is_left_alone() -> None:
    class Gated(LlamaAttention):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, *inputs: Any, **named: Any) -> Any:
            return super().forward(hidden_states, *inputs, **named)[0] * hidden_states, None

    assert lora_attention._only_hands_on(LlamaAttention)
    assert not lora_attention._only_hands_on(AfmoeAttention), "gated by its input"
    assert not lora_attention._only_hands_on(Gated)


def test_layers_of_a_kind_share_a_class_so_that_they_share_a_compiled_graph() -> None:
    ours = quickened(adapted(count=3))
    assert len({type(layer) for layer in ours.get_base_model().layers}) == 1


def test_an_attention_that_clips_its_outputs_in_place_keeps_three_layers() -> None:
    torch.manual_seed(0)
    net = Net(OlmoAttention, OlmoConfig(**SIZES, clip_qkv=0.5, attn_implementation="sdpa"))
    theirs = get_peft_model(net, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    ours = copy.deepcopy(theirs)
    assert lora_linear.quicken(ours) == 4
    assert lora_attention.quicken(ours) == 0
    x = torch.randn(2, 5, 32)
    assert_alike(outcome(ours, x), outcome(theirs, x), 1e-4)
