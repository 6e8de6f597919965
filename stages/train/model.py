"""The model that is trained: loaded, made ready, and written at the end.

What is trained is held in float32, split into 16 + 16 bits where nothing needs it in one piece (`stages.train.adamw`,
`stages.train.over_split`), and computed in the recipe's precision (else 16 bits through autocast). AdamW on bfloat16
weights loses every update smaller than about 1/256 of a weight, which at usual learning rates is most of them. What is
frozen is held in the recipe's precision, or in 4 or 8 bits.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from packing.attention import implementation
from packing.flash import Attention
from packing.rotary import by_document
from stages import heads, objectives, quantization, weight_files
from stages.errors import UserError
from stages.train import TrainConfig, adamw, adapters, eva, freezing, neftune
from stages.train.adapters import save as save_adapter

__all__ = ["in_float32", "load", "ready", "save_adapter", "save_weights", "trainable"]

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(
    folder: Path, config: TrainConfig, device: str, split: bool = False, attention: Attention = "auto"
) -> PreTrainedModel:
    """The model of a local folder, ready for packed batches, in the dtype it is trained in; `split` if that will be
    16 + 16 bits. `attention` chooses the kernel on a GPU.

    Raises UserError when transformers cannot load it without running code from the folder, or its weights came
    quantized.
    """
    narrow = DTYPES[config.precision]
    try:
        described = AutoConfig.from_pretrained(folder, local_files_only=True)
        exact = split and weight_files.dtype(folder) == torch.bfloat16
        frozen = config.method == "lora" and config.lora.restart_every is None
        dtype = narrow if exact or frozen else torch.float32
        quantization.refuse_quantized(described)
        small = quantization.settings(config.quantize, device, narrow) if config.quantize else {}
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=implementation(device, described, attention),
            local_files_only=True,
            **small,
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the model cannot be loaded for training: {error}") from error
    assert isinstance(model, PreTrainedModel)
    quantization.keep_gradients(model)
    by_document(model)
    return model


def ready(
    model: PreTrainedModel,
    config: TrainConfig,
    folder: Path,
    device: str,
    batches: Callable[[], Sequence[dict[str, Any]]],
) -> Any:
    """The loaded model of `folder` on its device, with its adapter or its frozen weights, and the objective's own head.

    `batches` gives a few batches as the model takes them, for an adapter that starts from activations. Raises UserError
    for names that match nothing and adapters that the model does not take.
    """
    if not config.quantize:  # which loads onto the device
        model.to(device)
    if config.method == "full":
        freezing.freeze(model, config.full)
        made: Any = model
    else:
        made = adapters.adapt(model, config.lora, folder).to(device)
        if config.lora.init == "eva":
            with torch.autocast(device, DTYPES[config.precision], enabled=config.precision != "fp32"):
                eva.start_from_activations(made, batches())
    if outputs := objectives.find(config.objective).head:
        heads.attach(made, outputs)
    if config.neftune_alpha is not None:
        neftune.add_noise(made, config.neftune_alpha)
    return made


def save_weights(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write all weights in the dtypes of the model they came from, in `source`."""
    described = AutoConfig.from_pretrained(source, local_files_only=True)
    dtype = weight_files.dtype(source)
    if dtype != torch.bfloat16:  # what that does not hold is not written
        adamw.widen(model)
    others = _of_another_dtype(described, dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = adamw.whole(tensor).to(others[name]) if name in others else tensor.data.to(dtype)
    model.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)  # the Trainer changed the one in memory


def _of_another_dtype(described: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The weights and buffers that transformers holds in another dtype than a model's own, such as the biases by which
    a router chooses experts: rounded, they choose others."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(described, dtype=dtype)
    kept = empty._get_dtype_plan(dtype)  # parts of names
    found = {}
    for name, tensor in [*empty.named_parameters(), *empty.named_buffers()]:
        wanted = next((kept[part] for part in kept if re.search(part.replace("*", ".*"), name)), tensor.dtype)
        if wanted != dtype:
            found[name] = wanted
    return found


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Hold all weights in float32 for a while. Widening and narrowing again changes no bit."""
    narrow = {p: p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
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
