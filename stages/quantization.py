"""Frozen weights in 4 or 8 bits, through bitsandbytes: under an adapter, and where score gives what such a training is
compared with.

nf4 is QLoRA's (arXiv:2305.14314), int8 that of LLM.int8() (arXiv:2208.07339).

What is quantized are the linear layers but the head. The adapter that is written goes onto the weights as they came.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import UserError
from stages.weight_files import tensors

MEND = "fetch the model in bfloat16 or float32, and let train.quantize make it small"


def refuse_quantized(described: Any) -> None:
    """Raise UserError for a model whose weights came quantized: what is trained on them could not be merged."""
    settings = getattr(described, "quantization_config", None)
    if settings:
        kind = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        kind = getattr(kind, "value", kind)
        raise UserError(f"train: the model's weights are quantized already ({kind}), and cannot be merged with: {MEND}")


def settings(kind: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers' `from_pretrained` takes to quantize while it loads.

    Raises UserError when bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantize: {kind} needs bitsandbytes, which is not installed: pip install 'regrow[quantized]'")
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": device}}


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on CPUs with AVX512-BF16.

    It does so at the first forward without gradients in eval mode, and every later forward, in training too, runs a
    kernel without a backward pass: gradients of adapters below come out as zeros, and nothing says so (0.50).
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def share(model: nn.Module) -> float:
    """Share of the model's weights that are held quantized."""
    quantized = sum(layer.in_features * layer.out_features for layer in _quantized(model))
    wide = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    return float(quantized / (quantized + wide))


def start_from_loss(model: Any, folder: Path) -> None:
    """LoftQ in one step: B A becomes the best approximation, at its rank, of what quantization took from each weight.

    `model` is one of PEFT's over nf4 weights; `folder` holds the weights as they came.
    """
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    original = dict(tensors(folder))
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        key = f"{name.removeprefix('base_model.model.')}.weight"
        if key not in original:
            raise UserError(f"train.lora.init loftq: {key} is not held as it was saved; choose another init")
        layer = module.get_base_layer()
        kept, whole = dequantize_module_weight(layer).float(), original[key]()
        if issubclass(layer.source_cls, Conv1D):  # holds its weight the other way about, as the file does
            whole = whole.T
        lost = whole.to(kept.device).float() - kept
        u, s, v = torch.linalg.svd(lost / module.scaling["default"], full_matrices=False)
        rank = module.r["default"]
        root = s[:rank].sqrt()
        with torch.no_grad():
            module.lora_B["default"].weight.copy_(u[:, :rank] * root)
            module.lora_A["default"].weight.copy_(root[:, None] * v[:rank])


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Let quantized layers compute plainly, with the weights they stand for, while the block runs: what is compared
    there to many digits would differ by how activations are rounded to 8 bits."""
    layers = list(_quantized(model))
    for layer in layers:
        layer.forward = partial(_plainly, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _plainly(layer: Any, x: Tensor) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    return nn.functional.linear(x, dequantize_module_weight(layer).detach().to(x.dtype), layer.bias)


def _quantized(model: nn.Module) -> Iterator[Any]:
    if "bitsandbytes" in sys.modules:  # else nothing is
        import bitsandbytes

        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
                yield module
