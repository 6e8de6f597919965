"""The signature of flash-attn 2.8, in PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def each_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, scale: float | None, window: tuple[int, int], softcap: float
) -> Tensor:
    """[tokens, heads, head size] Causal; a window (left, 0) lets a token see `left` tokens before it."""
    assert cu_seqlens_q.dtype == torch.int32 and window[1] == 0
    outs = []
    groups = q.shape[1] // k.shape[1]
    for begin, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist(), strict=False):
        a, b, c = (each[begin:end].transpose(0, 1) for each in (q, k, v))
        b, c = b.repeat_interleave(groups, 0), c.repeat_interleave(groups, 0)
        scores = a @ b.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        behind = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (behind >= 0) & ((behind <= window[0]) | (window[0] < 0))
        outs.append((F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ c).transpose(0, 1))
    return torch.cat(outs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:
    assert causal and not dropout_p and max_seqlen_q >= int(cu_seqlens_q.diff().max())
    return each_document(q, k, v, cu_seqlens_q, softmax_scale, window_size, softcap)
