"""Attention that starts afresh at every document of a packed batch.

`register()` gives transformers an implementation called "regrow" through its `AttentionInterface`; load a model with
`attn_implementation=implementation(device, config)` and pass the batches of `packing.collate`. No model is patched:
transformers hands the boundaries (`cu_seq_lens_q`) from the model's arguments through to the attention function, and
builds no mask for an implementation that it knows no mask for.

On a GPU in 16-bit this is one variable-length kernel: torch's (`torch.nn.attention.varlen`), our own for Hopper
(`packing.hopper`) under the name "regrow_hopper", or that of an installed flash-attn (`packing.flash`), under the name
"regrow_fa2" to "regrow_fa4". Elsewhere each document is a call of scaled dot product attention: its cost is the sum of
squared document lengths, against the square of the sum for one call with a mask. (SmolLM2's 9 heads, 2,048 tokens in
documents of about 60, one CPU core, forward and backward: 26 ms against 471 ms.)
"""

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from packing import flash, hopper
from packing.flash import Attention

__all__ = ["implementation", "register"]

NAME = "regrow"

KERNEL_DOCUMENTS = 65_535
"""The most documents that one call of the kernel takes: they are a dimension of its grid of thread blocks."""

GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""From torch 2.12 the kernel wants to be told of fewer key heads; before, it takes them without being asked."""


def register() -> None:
    """Make "regrow", and its forms with flash-attn, known to transformers. Calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    AttentionInterface.register(f"{NAME}_hopper", partial(attend, own=True))
    own = torch.cuda.is_available() and hopper.runs_on(torch.cuda.get_device_capability())
    for version in flash.MODULES:
        AttentionInterface.register(f"{NAME}_fa{version}", partial(attend, flash_attn=version, own=own))


def implementation(device: "str | torch.device", config: Any = None, kernel: Attention = "auto") -> str:
    """The attention implementation to load a model with, for packed batches: "regrow", on every device, or unless
    `kernel` is torch its form for the fastest kernel that is there.

    Raises ValueError when `kernel` is flash and no flash-attn is installed that runs on the device.

    Two kinds of models, known by their `config`, get "eager", whose mask transformers builds from `position_ids`:
    those with chunked attention (Llama 4), which tell the attention function nothing of their chunks, and old ones that
    do not take an attention function at all. Whether that isolates documents is for `packing.isolation` to say.
    """
    register()
    capability = torch.cuda.get_device_capability() if torch.device(device).type == "cuda" else None
    version = None if kernel == "torch" else flash.installed(capability)
    if kernel == "flash" and version is None:
        raise ValueError(
            "attention flash: it needs a GPU of the generation Ampere or later"
            if capability is None or capability < flash.AMPERE
            else "attention flash: flash-attn is not installed: pip install 'regrow[flash4]', or 'regrow[flash]' "
            "before Hopper, or leave attention at auto"
        )
    text = None if config is None else config.get_text_config()  # a model that also takes images has one of its own
    chunked = getattr(text, "attention_chunk_size", None) is not None
    if chunked or not _takes_functions(config):
        return "eager"
    # flash-attn 2 is torch's kernel but for scores that are capped, which ours does not do either.
    slower = version is None or (version == 2 and getattr(text, "attn_logit_softcapping", None) is None)
    if kernel == "auto" and slower and capability is not None and hopper.runs_on(capability):
        return f"{NAME}_hopper"
    return NAME if version is None else f"{NAME}_fa{version}"


def _takes_functions(config: Any) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return model is None or bool(model._can_set_attn_implementation())


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    flash_attn: int | None = None,
    own: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; the signature is transformers' `AttentionInterface`.

    `query` is [1, heads, T, head size], `key` and `value` may have fewer heads; the result is [1, T, heads, head
    size]. A `sliding_window` of w lets a token see itself and the w - 1 before it. `softcap` bounds the scores and
    `s_aux` [heads] are attention sinks. `flash_attn` is the version of flash-attn to use where it can, `own` whether
    to use the kernels of `packing.hopper` where they can: instead of torch's, and of flash-attn's for sinks.

    Raises ValueError for what it would get wrong: no boundaries, more than one row, a mask, attention that is not
    causal, or more documents than the kernel takes.
    """
    kind = type(module).__name__
    if cu_seq_lens_q is None:
        raise ValueError(f"{kind} does not pass `cu_seq_lens_q` to its attention function: packing cannot isolate it")
    if attention_mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(f"{kind}: a packed batch is one row [1, T], without attention mask and without cache")
    if not getattr(module, "is_causal", True) or kwargs.get("position_bias") is not None:
        raise ValueError(f"{kind} is not plain causal attention: packing cannot isolate it")
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        # Weights in float32 make the embeddings, and by the rotation queries and keys, float32: no kernel takes those.
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    on_gpu = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0
    own = own and (flash_attn is None or s_aux is not None)
    if own and on_gpu and softcap is None and hopper.fits(query, key, value):
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return hopper.attention(q, k, v, cu_seq_lens_q, s_aux, scale, sliding_window)[0][None], None
    capped = softcap is not None and flash_attn is None
    if on_gpu and not capped and s_aux is None and query.shape[-1] == value.shape[-1] <= 256:
        assert max_length_q is not None, "packing.collate gives max_length_q"
        how = (scaling, sliding_window, softcap, flash_attn)
        return _kernel(query, key, value, cu_seq_lens_q, max_length_q, *how), None
    lengths = cu_seq_lens_q.diff().tolist()
    dtype = query.dtype
    # torch's 16-bit attention on a CPU is slower than its float32, by 2.5 times with its backward pass, and less exact.
    wide = torch.float32 if query.device.type == "cpu" else dtype
    with torch.autocast(query.device.type, enabled=False):
        # `split`, whose backward pass is one `cat`: every slice of `tensor_split` adds up a gradient of all T tokens.
        parts = zip(*(torch.split(each.to(wide), lengths, dim=2) for each in (query, key, value)), strict=True)
        blocks = [
            _explicit(q, k, v, scaling, dropout, sliding_window, softcap, s_aux)
            if softcap is not None or s_aux is not None
            else _block(q, k, v, scaling, dropout, sliding_window)
            for q, k, v in parts
            if q.shape[2]
        ]
        return torch.cat(blocks, dim=2).to(dtype).transpose(1, 2).contiguous(), None


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    flash_attn: int | None,
) -> Tensor:
    """[1, T, heads, head size] All documents in one kernel. `longest` may be more than the longest document, but the
    kernel starts its blocks for that length in every document, so the closer the faster."""
    if len(boundaries) - 1 > KERNEL_DOCUMENTS:
        raise ValueError(
            f"{len(boundaries) - 1} documents in a batch are more than the attention kernel takes "
            f"({KERNEL_DOCUMENTS}): lower the micro-batch or pack.max_documents"
        )
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    if flash_attn is not None:
        return flash.varlen(flash_attn, q, k, v, boundaries, longest, scaling, sliding_window, softcap)[None]
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out = varlen_attn(q, k, v, boundaries, boundaries, longest, longest, scale=scaling, window_size=window, **GROUPED)
    assert isinstance(out, Tensor)
    return out[None]


def _block(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None) -> Tensor:
    """[1, heads, t, head size] One document."""
    mask = _visible(q, window) if window is not None and window < q.shape[2] else None
    if q.is_cuda:  # in float32 what takes fewer heads of keys as they are keeps all scores
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=k.shape[1] != q.shape[1],
    )


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[1, heads, t, head size] One document with capped scores (softcap * tanh(score / softcap)) or with attention
    sinks (one more score a head that takes its share of the softmax and gives nothing)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(q, window), torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    return F.dropout(weights, dropout) @ v


def _visible(q: Tensor, window: int | None) -> Tensor:
    """[t, t] Which keys (columns) each query sees."""
    size = q.shape[2]
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    return causal if window is None else causal.triu(1 - window)
