"""The signatures of causal-conv1d 1.5, in PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def documents(seq_idx: Tensor | None, size: int) -> list[int]:
    """Tokens in each document, from `seq_idx` [1, tokens], which must be int32 as the kernels want it."""
    if seq_idx is None:
        return [size]
    assert seq_idx.dtype == torch.int32 and seq_idx.shape == (1, size), (seq_idx.dtype, seq_idx.shape)
    return torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist()


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """[1, channels, tokens]"""
    width = weight.shape[1]
    parts = [
        F.conv1d(F.pad(part, (width - 1, 0)), weight[:, None], bias, groups=len(weight))
        for part in torch.split(x, documents(seq_idx, x.shape[2]), dim=2)
    ]
    out = torch.cat(parts, dim=2)
    return F.silu(out) if activation in ("silu", "swish") else out


def causal_conv1d_update(*_: Any, **__: Any) -> Tensor:
    raise NotImplementedError("for generation")
