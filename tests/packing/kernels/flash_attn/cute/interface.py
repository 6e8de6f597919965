"""What is called of flash-attn 4 (4.0.0b36): it has more arguments with defaults than are named here."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import each_document


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    assert causal and cu_seqlens_q is not None and max_seqlen_q is not None
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    assert all(each.stride(-1) == 1 for each in (q, k, v))
    out = each_document(q, k, v, cu_seqlens_q, softmax_scale, _windows(window_size), softcap)
    return out, out.new_zeros(q.shape[1], len(q), dtype=torch.float32)


def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    m_block_size: int = 64,
    n_block_size: int = 128,
    num_threads: int = 256,
    pack_gqa: bool = False,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    **_: Any,
) -> tuple[Tensor, ...]:
    assert causal and cu_seqlens_q is not None and lse.shape == (q.shape[1], len(q))
    window = _windows((window_size_left, window_size_right))
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    for begin, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist(), strict=False):
        a, b, c, d = (each[begin:end].transpose(0, 1) for each in (q, k, v, dout))
        b, c = b.repeat_interleave(groups, 0), c.repeat_interleave(groups, 0)
        scores = a @ b.transpose(1, 2) * scale
        capped = torch.tanh(scores / softcap) if softcap else scores
        behind = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (behind >= 0) & ((behind <= window[0]) | (window[0] < 0))
        shares = F.softmax((capped * (softcap or 1)).masked_fill(~seen, float("-inf")), dim=-1)
        d_shares = d @ c.transpose(1, 2)
        d_scores = shares * (d_shares - (d_shares * shares).sum(-1, keepdim=True)) * scale
        d_scores = d_scores * (1 - capped**2) if softcap else d_scores
        d_q[begin:end] = (d_scores @ b).transpose(0, 1)
        for place, each in ((d_k, d_scores.transpose(1, 2) @ a), (d_v, shares.transpose(1, 2) @ d)):
            place[begin:end] = each.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return d_q, d_k, d_v


def _windows(window: tuple[int | None, int | None]) -> tuple[int, int]:
    """As version 2 counts: -1 for no bound, which version 4 takes for None."""
    assert window == (None, None) or window[1] == 0
    return (-1 if window[0] is None else window[0], 0)
