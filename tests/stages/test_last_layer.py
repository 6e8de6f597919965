"""The last layer's feed-forward half over the trained tokens alone: the same losses and gradients, to float tolerance,
as when it computes all tokens; for every architecture whose form is known, in every mode of recomputing, compiled.
"""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from transformers import AutoModelForCausalLM

from packing.attention import implementation
from packing.collate import IGNORED, Bin, collate
from stages import last_layer, lm_head
from stages.train import float8, lora_attention, lora_linear, lora_mlp, recomputing, speed
from tests.stages import tiny
from tests.stages.test_train_architectures import TRAINED, some

TOKENS = 256
SHORTENED = {
    *("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Gemma4Text", "Phi3", "Granite"),
    *("Olmo2", "Olmo3", "SmolLM3", "Cohere", "Cohere2", "Glm4", "Ernie4_5", "Exaone4", "SeedOss", "Apertus"),
}


@given(st.lists(st.booleans(), min_size=1, max_size=700))
def test_what_is_kept_holds_what_trains(trains: list[bool]) -> None:
    positions = torch.tensor(trains).nonzero()[:, 0]
    kept = last_layer.some(positions, len(trains))
    if kept is None:
        assert len(positions) + last_layer.MULTIPLE > last_layer.WORTH * len(trains)
        return
    assert len(kept) % last_layer.MULTIPLE == 0
    assert len(kept) < len(positions) + last_layer.MULTIPLE
    assert set(positions.tolist()) <= set(kept.tolist()) <= set(range(len(trains)))
    assert kept.tolist() == sorted(set(kept.tolist()))


def model_of(folder: Path, name: str, attention: str | None = None) -> Any:
    made = tiny.save(folder, f"{name}Config", **TRAINED[name])
    return AutoModelForCausalLM.from_pretrained(made, attn_implementation=attention or implementation("cpu"))


def batch_of(seed: int, share: float = 0.3) -> dict[str, Any]:
    """Three documents, of which about a share trains."""
    random = np.random.default_rng(seed)
    ids = random.integers(3, tiny.VOCABULARY, TOKENS)
    labels = np.where(random.random(TOKENS) < share, ids, IGNORED)
    return lm_head.pick(collate([Bin(ids, labels, np.array([100, 56, 100]))]))


def found(model: Any, head: lm_head.Head, batch: dict[str, Any]) -> list[Tensor]:
    """The loss and every gradient."""
    loss = head.loss(batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss, *torch.autograd.grad(loss, parameters, materialize_grads=True)]


def assert_same(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", some(TRAINED))
def test_the_loss_and_every_gradient_are_the_same(tmp_path: Path, name: str) -> None:
    model, batch = model_of(tmp_path / "model", name), batch_of(0)
    head = lm_head.find(model, batch)
    assert head.shortened == (name in SHORTENED)
    without = {key: value for key, value in batch.items() if key != last_layer.KEPT}
    assert len(batch[last_layer.KEPT]) <= TOKENS / 2
    model.eval()  # some models have dropout or noise, which other rows draw otherwise
    assert_same(found(model, head, batch), found(model, head, without))


def test_layers_in_8_bits_are_tried_without_them(tmp_path: Path) -> None:
    """Rounding differs with what stands beside a number, which is no sign of another result."""
    model = model_of(tmp_path / "model", "Llama")
    converted = float8.convert(recomputing.layers(model))
    with float8.switched_off(model):
        assert lm_head.find(model, batch_of(0)).shortened
    assert sum(type(module) is float8.Float8Linear for module in model.modules()) == converted > 0


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_fewer_tokens_go_through_it(tmp_path: Path, name: str) -> None:
    model, batch = model_of(tmp_path / "model", name), batch_of(0)
    head = lm_head.find(model, batch)
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda _, inputs, out: seen.append(out.shape[1]))
    head.loss(batch)
    assert seen == [TOKENS, len(batch[last_layer.KEPT])]


@pytest.mark.parametrize(
    ("mode", "compiled"), [*((mode, False) for mode in recomputing.MODES), ("selective", True), ("full", True)]
)
def test_recomputing_computes_the_same_tokens_again(tmp_path: Path, mode: recomputing.Mode, compiled: bool) -> None:
    model = model_of(tmp_path / "model", "Gemma2").train()
    head = lm_head.find(model, batch_of(0))
    expected = [found(model, head, batch_of(seed)) for seed in (0, 1)]
    recomputing.recompute(model, mode, compiled)
    losses = [head.loss(batch_of(seed)) for seed in (0, 1)]  # both forward passes before the backward ones
    parameters = list(model.parameters())
    for loss, values in zip(losses, expected, strict=True):
        assert_same([loss, *torch.autograd.grad(loss, parameters, materialize_grads=True)], values)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_compiled_layers_are_not_compiled_anew_for_other_counts(tmp_path: Path, method: str) -> None:
    model = model_of(tmp_path / "model", "Llama", "sdpa")  # ours has no graph on a CPU
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        assert (lora_linear.quicken(model), lora_mlp.quicken(model), lora_attention.quicken(model)) == (14, 2, 2)
    head = lm_head.find(model, batch_of(0))
    expected = [found(model, head, batch_of(seed, share)) for seed, share in enumerate((0.2, 0.4, 0.6, 0.1))]
    graphs: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(1)
        return aot_eager(graph, example)

    for layer in recomputing.layers(model):
        layer.forward = torch.compile(layer.forward, backend=backend)
    counts = []
    for seed, share in enumerate((0.2, 0.4, 0.6, 0.1)):
        assert_same(found(model, head, speed.marked(batch_of(seed, share))), expected[seed])
        counts.append(len(graphs))
    assert counts == [2, 2, 2, 2]  # one for the last layer, one for all others


def test_a_layer_that_does_not_hand_on_what_it_does_not_know_stays_whole(tmp_path: Path) -> None:
    model, batch = model_of(tmp_path / "model", "Llama"), batch_of(0)
    forward = model.model.forward

    def narrow(**named: Any) -> Any:
        if last_layer.KEPT in named:
            raise TypeError("forward() got an unexpected keyword argument")
        return forward(**named)

    model.model.forward = narrow
    before = [type(module) for module in model.modules()]
    assert not lm_head.find(model, batch).shortened
    assert [type(module) for module in model.modules()] == before
