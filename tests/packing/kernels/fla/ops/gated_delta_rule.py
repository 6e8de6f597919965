"""The signatures of flash-linear-attention 0.4, in PyTorch."""

from typing import Any

import torch
from torch import Tensor


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """[1, tokens, heads, head size], and no state."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule.__wrapped__
    lengths = [q.shape[1]] if cu_seqlens is None else [n for n in cu_seqlens.diff().tolist() if n]
    parts = zip(*(torch.split(each, lengths, dim=1) for each in (q, k, v, g, beta)), strict=True)
    named = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
    return torch.cat([rule(pq, pk, pv, g=pg, beta=pb, **named)[0] for pq, pk, pv, pg, pb in parts], dim=1), None


def fused_recurrent_gated_delta_rule(*_: Any, **__: Any) -> None:
    raise NotImplementedError("for generation")
