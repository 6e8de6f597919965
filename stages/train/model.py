"""The model that is trained: loaded, given its adapter, and written at the end.

What is trained is held in float32 and computed in the recipe's precision (16 bits through autocast). AdamW on bfloat16
weights loses every update smaller than about 1/256 of a weight, which at usual learning rates is most of them. What is
frozen is held in the recipe's precision.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from packing.attention import implementation
from stages.errors import UserError
from stages.train import Lora, TrainConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def autocast(device: str, precision: str) -> torch.autocast:
    """The arithmetic of a precision, as a block."""
    return torch.autocast(device, DTYPES[precision], enabled=precision != "fp32")


def load(folder: Path, config: TrainConfig, device: str) -> PreTrainedModel:
    """The model of a local folder, ready for packed batches, in the dtype it is trained in.

    Raises UserError when transformers cannot load it without running code from the folder.
    """
    dtype = DTYPES[config.precision] if config.method == "lora" else torch.float32
    try:
        described = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=implementation(device, described), local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the model cannot be loaded for training: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def adapt(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """The model with a fresh float32 LoRA adapter, everything else frozen; the start is drawn from torch's seed.

    Raises UserError when a target names no layer or a layer is narrower than the rank.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if not isinstance(lora.targets, str):
        _refuse_bad_targets(model, lora.targets, layers)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
            task_type="CAUSAL_LM",
        ),
    )
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            narrowest = min(module.in_features, module.out_features)
            if lora.rank > narrowest:
                raise UserError(
                    f"train.lora.rank is {lora.rank}, but {name.removeprefix('base_model.model.')} is only {narrowest} "
                    "wide: choose a rank no larger, or leave that layer out of train.lora.targets"
                )
            # Autocast chooses the arithmetic; PEFT would lift the layer's input to float32 first.
            module.cast_input_dtype_enabled = False
    return adapted


def _refuse_bad_targets(model: PreTrainedModel, targets: tuple[str, ...], layers: dict[str, nn.Module]) -> None:
    for target in targets:
        meant = [layers[name] for name in layers if name == target or name.endswith(f".{target}")]
        if not meant:
            choices = sorted({name.rpartition(".")[2] for name in layers})
            raise UserError(f"train.lora.targets: no layer is called {target!r}; there are {', '.join(choices)}")
        if model.config.get_text_config().tie_word_embeddings and model.get_output_embeddings() in meant:
            raise UserError(
                f"train.lora.targets: {target!r} shares its weights with the embeddings, so an adapter on it cannot be "
                "merged: leave it out"
            )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter the way PEFT loads it, with bytes that depend on nothing but the training."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's blank model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = None  # a path of this machine
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT keeps a set
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_weights(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write all weights in the dtype of the model they came from, in `source`."""
    dtype = AutoConfig.from_pretrained(source, local_files_only=True).dtype
    model.to(dtype or torch.float32).save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)  # the Trainer changed the one in memory


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Hold all weights in float32 for a while. Widening and narrowing again changes no bit."""
    narrow = {parameter: parameter.dtype for parameter in model.parameters() if parameter.dtype != torch.float32}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow.items():
            parameter.data = parameter.data.to(dtype)


def trainable(model: Any) -> int:
    """Weights that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
