"""The flash-attn packages' kernel for packed documents, where one is installed: the newest that runs on the GPU.

torch brings a kernel of its own (`torch.nn.attention.varlen`, a flash-attn 2), so these are asked for where they are
faster, as version 4 is on Hopper, and on models that cap their scores, which torch's kernel does not. Version 4 is
written in Python and compiled when it is first called; it is no operation of torch's library, so `regrow::flash_attn_4`
makes one of it, which torch.compile leaves whole.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Attention", "installed", "varlen"]

Attention = Literal["auto", "torch", "flash"]

MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}
"""Where each version keeps `flash_attn_varlen_func`."""
HOPPER = (9, 0)
AMPERE = (8, 0)


def installed(capability: tuple[int, int] | None) -> int | None:
    """The newest version that is installed and runs on a GPU of this compute capability; None without a GPU."""
    if capability is None:
        return None
    runs = {4: capability >= HOPPER, 3: capability == HOPPER, 2: capability >= AMPERE}
    return next((version for version, module in MODULES.items() if runs[version] and _is_there(module)), None)


def _is_there(module: str) -> bool:
    """Whether a package is installed. The folder `flash_attn` alone is none: version 4 lies in it, too."""
    package, _, _ = module.partition(".")
    spec = find_spec(package) and find_spec(module)
    return bool(spec and spec.origin)


def varlen(
    version: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """[T, heads, head size] Causal attention within each document. `query` is [T, heads, head size], `key` and `value`
    may have fewer heads; `boundaries` int32 [documents + 1]; a `sliding_window` of w lets a token see w tokens."""
    if version == 4:
        out: Tensor = flash_attn_4(query, key, value, boundaries, longest, scaling, sliding_window, softcap or 0.0)[0]
        return out
    function, takes = _function(version)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    wanted: dict[str, Any] = {
        "cu_seqlens_q": boundaries,
        "cu_seqlens_k": boundaries,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": scaling,
        "causal": True,
        "window_size": window,
        "softcap": softcap or 0.0,
    }
    if "deterministic" in takes:
        wanted["deterministic"] = torch.are_deterministic_algorithms_enabled()
    found = function(query, key, value, **wanted)
    result: Tensor = found[0] if isinstance(found, tuple) else found  # version 3 gave the scores' sums for a while
    return result


@cache
def _function(version: int) -> tuple[Callable[..., Any], frozenset[str]]:
    """The kernel's function, and the names it takes."""
    function = importlib.import_module(MODULES[version]).flash_attn_varlen_func
    return function, frozenset(inspect.signature(function).parameters)


@torch.library.custom_op("regrow::flash_attn_4", mutates_args=())
def flash_attn_4(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scaling: float | None,
    sliding_window: int | None, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[T, heads, head size] As `varlen`; and the logarithms of the scores' sums [heads, T], float32."""
    function, _ = _function(4)
    found = function(
        query,
        key,
        value,
        cu_seqlens_q=boundaries,
        cu_seqlens_k=boundaries,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
        window_size=_window(sliding_window),
        softcap=softcap,
        return_lse=True,
    )
    return found[0].contiguous(), found[1].contiguous()


@flash_attn_4.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads = query.shape[:2]
    shape = (tokens, heads, value.shape[2])
    return query.new_empty(shape), query.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("regrow::flash_attn_4_backward", mutates_args=())
def _gradients_4(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, boundaries: Tensor,
    longest: int, scaling: float | None, sliding_window: int | None, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by query, key and value."""
    left, right = _window(sliding_window)
    q, k, v = importlib.import_module(f"{MODULES[4]}.interface")._flash_attn_bwd(
        query,
        key,
        value,
        out,
        d_out.contiguous(),
        sums,
        softmax_scale=scaling,
        causal=True,
        softcap=softcap,
        window_size_left=left,
        window_size_right=right,
        cu_seqlens_q=boundaries,
        cu_seqlens_k=boundaries,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return q.contiguous(), k.contiguous(), v.contiguous()


@_gradients_4.register_fake
def _(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (each.new_empty(each.shape) for each in (query, key, value))
    return q, k, v


def _window(sliding_window: int | None) -> tuple[int | None, int | None]:
    """As version 4 wants it: how many tokens before and after itself a token sees."""
    return (None, None) if sliding_window is None else (sliding_window - 1, 0)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, boundaries, *ctx.how = inputs
    out, sums = output
    ctx.save_for_backward(query, key, value, out, sums, boundaries)
    ctx.mark_non_differentiable(sums)


def _backward(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (*_gradients_4(d_out, *ctx.saved_tensors, *ctx.how), None, None, None, None, None)


flash_attn_4.register_autograd(_backward, setup_context=_keep)
