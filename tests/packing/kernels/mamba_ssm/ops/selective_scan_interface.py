"""The first Mamba's scan takes no boundaries: there is nothing to stand in for but its absence of them."""

from typing import Any

from torch import Tensor


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """As transformers computes it."""
    from transformers.models.jamba import modeling_jamba

    scan = modeling_jamba.mamba_selective_scan.__wrapped__
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
