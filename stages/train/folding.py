"""Adapters that start as a part of the weights: PiSSA (arXiv:2404.02948), OLoRA (2406.01775), LoftQ (2310.08659).

PiSSA and OLoRA take s B0 A0 out of a weight and train it in the adapter, so the adapter fits that changed weight and no
other. What is written fits the model as it came:

    (W - s B0 A0) + s B A  =  W + [s B, -s B0] [A; A0]

a plain LoRA of twice the rank. LoftQ's B0 A0 makes up for what quantization lost; after training on the quantized
weights, the same difference goes onto the full ones.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file


def remember(model: PeftModel) -> None:
    """Note the adapters of a model as they are now, before the first step: each layer's `start` is A0 [rank, in] and
    B0 [out, rank]."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.start = tuple(
                side["default"].weight.detach().cpu().clone() for side in (module.lora_A, module.lora_B)
            )


def starts(model: Any) -> dict[str, Any]:
    """What was noted, by the layers' names."""
    return {name: module.start for name, module in model.named_modules() if hasattr(module, "start")}


def put_starts(model: Any, noted: dict[str, Any]) -> None:
    """Have the same model, made anew, start from what was noted: another device draws other numbers for PiSSA."""
    for name, start in noted.items():
        model.get_submodule(name).start = start


def unfold(model: PeftModel, path: Path) -> dict[str, Any]:
    """Rewrite a saved adapter for the model as it came, if its layers have a start that was noted. Returns what changes
    in its config."""
    started = {name: module for name, module in model.named_modules() if hasattr(module, "start")}
    if not started:
        return {}
    tensors = load_file(path)
    rank = 0
    for name, module in started.items():
        a0, b0 = module.start
        a, b = (f"{name}.lora_{side}.weight" for side in "AB")
        scale = module.scaling["default"]
        tensors[a] = torch.cat([tensors[a], a0])
        tensors[b] = torch.cat([scale * tensors[b], -scale * b0], dim=1)
        rank = len(tensors[a])
    save_file(tensors, path, metadata={"format": "pt"})
    return {"r": rank, "lora_alpha": rank, "use_rslora": False, "init_lora_weights": True}
