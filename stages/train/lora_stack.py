"""Frozen weights of layers that read the same x, laid one under another in memory, so that one product takes them all.

Every layer keeps its own weight, now a part of the whole: what reads, merges or writes weights sees what it saw. Where
something has put a weight elsewhere since, the layers are multiplied one by one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.train.lora_linear import wide

__all__ = ["as_one", "stack"]


@torch.no_grad()
def stack(layers: Sequence[Any]) -> None:
    """Lay the weights of adapted layers one under another, if they are numbers of one dtype and not 4 bits."""
    weights = [layer.base_layer.weight for layer in layers]
    if any(layer.absmax is not None for layer in layers) or len({weight.dtype for weight in weights}) > 1:
        return
    whole = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, torch.split(whole, [len(weight) for weight in weights]), strict=True):
        weight.data = part


def as_one(
    weights: Sequence[Tensor], absmaxes: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]
) -> list[Tensor]:
    """Weights [out, in] that are, one under another, those given, in as few pieces as they lie in. With `absmaxes` they
    are nf4, and widened to the dtype of the adapters."""
    if absmaxes:
        return [wide(*each) for each in zip(weights, absmaxes, a, b, strict=True)]
    begin = weights[0].data_ptr()
    for weight in weights:
        if not weight.is_contiguous() or weight.data_ptr() != begin or not _share(weight, weights[0]):
            return list(weights)
        begin += weight.nbytes
    return [weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())]


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
