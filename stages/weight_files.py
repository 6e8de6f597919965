"""The tensors of a model's folder by name, read one at a time."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def tensors(folder: Path) -> "Iterator[tuple[str, Callable[[], torch.Tensor]]]":
    """Name and reader of every tensor in a folder's safetensors files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, framework="pt")
        for name in sorted(file.keys()):
            yield name, partial(file.get_tensor, name)
