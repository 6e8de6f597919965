"""LoRA over nf4 weights as one operation, on the CPU: the same code as on a GPU but for the kernels.

What is compared is a training's own model (its loading, adapters, 16 + 16 bits and fused layers) with a plain one that
holds the weights for which the 4 bits stand.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.train import TrainConfig, lora_linear, lora_mlp, model, speed
from tests.stages import tiny

CONFIG = TrainConfig.model_validate({"quantize": "nf4", "lora": {"rank": 4}, "precision": "bf16"})


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    pytest.importorskip("bitsandbytes")
    torch.set_num_threads(1)


def qlora(folder: Path, layers: int = 2, config: TrainConfig = CONFIG) -> Any:
    """As `stages.train.run` holds it, with random adapters."""
    tiny.save(folder, "LlamaConfig", dtype="bfloat16", hidden_size=64, head_dim=16, num_hidden_layers=layers)
    made = model.ready(model.load(folder, config, "cpu", True), config, folder, "cpu", lambda: [])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return made


def widened(quantized: Any) -> Any:
    """The same model with plain layers that hold what the 4 bits stand for."""
    from bitsandbytes.nn import Linear4bit
    from peft.utils.integrations import dequantize_module_weight

    plain = copy.deepcopy(quantized)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Linear4bit):
            layer = nn.Linear(module.in_features, module.out_features, bias=False)
            layer.weight = nn.Parameter(dequantize_module_weight(module).float(), requires_grad=False)
            parent, _, short = name.rpartition(".")
            setattr(plain.get_submodule(parent), short, layer)
    return plain.float()


def batch(tokens: int = 48) -> dict[str, Any]:
    boundaries = torch.tensor([0, 20, tokens], dtype=torch.int32)
    torch.manual_seed(2)
    return {
        "input_ids": torch.randint(0, tiny.VOCABULARY, (1, tokens)),
        "position_ids": torch.cat([torch.arange(20), torch.arange(tokens - 20)])[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": 32,
        "max_length_k": 32,
    }


def gradients(made: Any) -> list[Tensor]:
    given = batch()
    logits = made(**given, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], given["input_ids"][0, 1:])
    return list(torch.autograd.grad(loss, [p for p in made.parameters() if p.requires_grad]))


def test_gradients_are_those_over_the_weights_the_4_bits_stand_for(tmp_path: Path) -> None:
    exact = CONFIG.model_copy(update={"precision": "fp32"})
    made = qlora(tmp_path, config=exact)
    expected = gradients(widened(made))
    assert (lora_linear.quicken(made), lora_mlp.quicken(made)) == (14, 2), "nothing is left to PEFT"
    for one, other in zip(gradients(made), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_scales_are_the_same_whether_they_were_quantized_themselves_or_not(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(96, 64, dtype=torch.bfloat16)
    for nested in (True, False):
        packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
        a, b = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(96, 2, dtype=torch.bfloat16)
        ours = lora_linear.wide(packed, lora_linear._scales(state), a, b)
        assert torch.equal(ours, dequantize_4bit(packed, state))


@pytest.mark.full
def test_layers_over_4_bits_share_their_compiled_graphs(tmp_path: Path) -> None:
    def graphs(layers: int) -> int:
        torch._dynamo.reset()
        made = qlora(tmp_path / str(layers), layers)
        speed.hold(made, CONFIG)
        kinds = {type(m) for m in made.modules() if isinstance(m, lora_linear.Fast)}
        assert len(kinds) == 1, "one class for all layers"
        assert len({type(m) for m in made.modules() if isinstance(m, lora_mlp._FastMlp)}) == 1
        seen: list[int] = []

        def count(graph: Any, inputs: Any) -> Any:
            seen.append(1)
            return graph.forward

        for layer in speed.layers(made):
            layer.compile(backend=count)
        made(**batch(), use_cache=False)
        return len(seen)

    assert graphs(4) == graphs(2) >= 1
