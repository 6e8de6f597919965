"""The flash-attn packages' kernel for packed documents, where one is installed: version 3 on Hopper, else version 2.

torch brings a kernel of its own (`torch.nn.attention.varlen`, a flash-attn 2), so these are asked for where they are
faster: version 3 on long documents, and both on models that cap their scores, which torch's kernel does not.
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

MODULES = {3: "flash_attn_interface", 2: "flash_attn"}
"""Where each version keeps `flash_attn_varlen_func`."""
HOPPER = (9, 0)
AMPERE = (8, 0)


def installed(capability: tuple[int, int] | None) -> int | None:
    """The newest version that is installed and runs on a GPU of this compute capability; None without a GPU."""
    if capability is None:
        return None
    runs = {3: capability == HOPPER, 2: capability >= AMPERE}
    return next((version for version, module in MODULES.items() if runs[version] and find_spec(module)), None)


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
    out = function(query, key, value, **wanted)
    result: Tensor = out[0] if isinstance(out, tuple) else out  # version 3 gave the scores' sums, too, for a while
    return result


@cache
def _function(version: int) -> tuple[Callable[..., Any], frozenset[str]]:
    """The kernel's function, and the names it takes."""
    function = importlib.import_module(MODULES[version]).flash_attn_varlen_func
    return function, frozenset(inspect.signature(function).parameters)
