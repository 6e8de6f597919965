"""The tensors of a model's folder by name, read one at a time, and the number type that they are held in."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


INDEX = "model.safetensors.index.json"
"""Where the weights of a model in several files are."""
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def names(folder: Path) -> list[str]:
    """The tensors' names, by the index where there is one. Reads no tensor, and does without torch."""
    if (folder / INDEX).exists():
        return list(json.loads((folder / INDEX).read_text())["weight_map"])
    from safetensors import safe_open

    found: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            found += file.keys()
    return found


def tensors(folder: Path) -> "Iterator[tuple[str, Callable[[], torch.Tensor]]]":
    """Name and reader of every tensor in a folder's safetensors files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, framework="pt")
        for name in sorted(file.keys()):
            yield name, partial(file.get_tensor, name)


def dtype(folder: Path) -> "torch.dtype":
    """The number type of a model: what its config.json says, else that of the first floating tensor in its files. It is
    what transformers' `dtype="auto"` takes."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    said = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
    if isinstance(said, torch.dtype):
        return said
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if floating := _FLOATS.get(file.get_slice(name).get_dtype()):
                    found: torch.dtype = getattr(torch, floating)
                    return found
    return torch.float32
