"""The signature of flash-attn 3 (its `hopper` folder), in PyTorch."""

from typing import Any

from flash_attn import each_document
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Any = None,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, None]:
    assert causal and max_seqlen_q >= int(cu_seqlens_q.diff().max())
    return each_document(q, k, v, cu_seqlens_q, softmax_scale, window_size, softcap), None
