"""The tensors of a model's folder by name, read one at a time."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


INDEX = "model.safetensors.index.json"
"""Where the weights of a model in several files are."""


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
