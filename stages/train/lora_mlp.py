"""The first half of a gated feed-forward layer with LoRA adapters as one operation: silu(gate(x)) * up(x).

Gate and up are the widest activations of a model. Adding an adapter's product to each is a pass over both; here it is
added where silu reads them anyway, forward and backward, and both share one product with x and one pass over x's
gradient. See `stages.train.lora_linear`.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.train.lora_linear import Fast, wide

__all__ = ["lora_swiglu", "quicken"]

TRIED_ROWS = 16
"""Rows of random input on which a layer is compared with what it was before."""
TOLERANCE = 0.02
"""Largest difference, relative to the largest output: room for bfloat16."""


@torch.library.custom_op("regrow::lora_swiglu", mutates_args=())
def lora_swiglu(
    x: Tensor, gate: Tensor, up: Tensor, gate_absmax: Tensor | None, up_absmax: Tensor | None,
    gate_a: Tensor, gate_b: Tensor, up_a: Tensor, up_b: Tensor, gate_scale: float, up_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The result [..., width]; then, for the backward pass, x gate', x up', and scale x A' of both [rows, rank]."""
    rows = x.reshape(-1, x.shape[-1])
    reduced = rows @ torch.cat([gate_a * gate_scale, up_a * up_scale]).T
    rank = gate_a.shape[0]
    # Copies also of a single row, whose parts are contiguous already: an operation's results must not share memory.
    by_gate, by_up = (
        half.clone(memory_format=torch.contiguous_format) for half in torch.split(reduced, [rank, len(up_a)], 1)
    )
    gates = rows @ wide(gate, gate_absmax, gate_a, gate_b).T
    ups = rows @ wide(up, up_absmax, up_a, up_b).T
    if x.is_cuda:
        from stages.kernels import swiglu

        out = swiglu.forward(gates, ups, (by_gate, by_up), (gate_b, up_b))
    else:
        out = F.silu(gates + by_gate @ gate_b.T) * (ups + by_up @ up_b.T)
    return out.view(*x.shape[:-1], out.shape[-1]), gates, ups, by_gate, by_up


@lora_swiglu.register_fake
def _(
    x: Tensor, gate: Tensor, up: Tensor, gate_absmax: Any, up_absmax: Any,
    gate_a: Tensor, gate_b: Tensor, up_a: Tensor, up_b: Tensor, gate_scale: float, up_scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    width, rows = gate_b.shape[0], x.shape[:-1].numel()
    flat = [x.new_empty(rows, width) for _ in range(2)] + [x.new_empty(rows, a.shape[0]) for a in (gate_a, up_a)]
    return x.new_empty(*x.shape[:-1], width), *flat


@torch.library.custom_op("regrow::lora_swiglu_backward", mutates_args=())
def _gradients(
    d_out: Tensor, x: Tensor, gate: Tensor, up: Tensor, gate_absmax: Tensor | None, up_absmax: Tensor | None,
    gate_a: Tensor, gate_b: Tensor, up_a: Tensor, up_b: Tensor,
    gates: Tensor, ups: Tensor, by_gate: Tensor, by_up: Tensor, gate_scale: float, up_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by x, gate's a and b, up's a and b."""
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(gates.shape).contiguous()
    if x.is_cuda:
        from stages.kernels import swiglu

        d_gate, d_up = swiglu.backward(d_rows, gates, ups, (by_gate, by_up), (gate_b, up_b))
    else:
        g, u = gates + by_gate @ gate_b.T, ups + by_up @ up_b.T
        share = torch.sigmoid(g)
        d_gate, d_up = d_rows * u * share * (1 + g * (1 - share)), d_rows * g * share
    d_reduced = torch.cat([d_gate @ (gate_b * gate_scale), d_up @ (up_b * up_scale)], dim=1)
    by_x = d_gate @ wide(gate, gate_absmax, gate_a, gate_b)
    by_x.addmm_(d_up, wide(up, up_absmax, up_a, up_b))
    by_x.addmm_(d_reduced, torch.cat([gate_a, up_a]))
    by_a = d_reduced.T @ rows
    rank = gate_a.shape[0]
    by_gate_b, by_up_b = d_gate.T @ by_gate, d_up.T @ by_up
    return by_x.view(x.shape), by_a[:rank].clone(), by_gate_b, by_a[rank:].clone(), by_up_b


@_gradients.register_fake
def _(
    d_out: Tensor, x: Tensor, gate: Tensor, up: Tensor, gate_absmax: Any, up_absmax: Any,
    gate_a: Tensor, gate_b: Tensor, up_a: Tensor, up_b: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(torch.empty_like(each) for each in (x, gate_a, gate_b, up_a, up_b))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.scales = inputs[9:]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    by_x, *adapters = _gradients(d_out, *ctx.saved_tensors, *ctx.scales)
    return by_x, None, None, None, None, *adapters, None, None


lora_swiglu.register_autograd(_backward, setup_context=_keep)


class _FastMlp:
    """The forward pass of a layer with gate_proj, up_proj and down_proj."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """[..., width] from [..., width]."""
        gate, up = self.gate_proj, self.up_proj
        if not (gate.is_plain_now(x) and up.is_plain_now(x)):
            return super().forward(x)  # type: ignore[misc,no-any-return]
        g, u = gate.active_adapters[0], up.active_adapters[0]
        hidden = lora_swiglu(
            x, gate.base_layer.weight, up.base_layer.weight, gate.absmax, up.absmax,
            gate.lora_A[g].weight, gate.lora_B[g].weight, up.lora_A[u].weight, up.lora_B[u].weight,
            gate.scaling[g], up.scaling[u],
        )[0]  # fmt: skip
        return self.down_proj(hidden)  # type: ignore[no-any-return]


def quicken(model: nn.Module) -> int:
    """Have every feed-forward layer of this form compute so, if that gives what it gave. Returns how many."""
    found = 0
    for module in model.modules():
        if not isinstance(module, _FastMlp) and _fits(module):
            kind: Any = type(module)
            now = _fast_class(kind)
            if _same(module, now):
                module.__class__ = now
                found += 1
    return found


@cache  # one class for all layers of a kind, or torch.compile would compile each by itself
def _fast_class(before: type) -> type:
    return type(f"Fast{before.__name__}", (_FastMlp, before), {})


def _fits(module: nn.Module) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj")]
    fast = all(isinstance(part, Fast) and part.base_layer.bias is None for part in parts)
    return fast and hasattr(module, "act_fn") and hasattr(module, "down_proj")


@torch.no_grad()
def _same(module: Any, now: type) -> bool:
    """Whether the layer gives the same either way; its adapters' zeros filled for the trial."""
    layers = [module.gate_proj, module.up_proj]
    factors = [layer.lora_B[layer.active_adapters[0]].weight for layer in layers]
    kept = [factor.clone() for factor in factors]
    a = module.gate_proj.lora_A[module.gate_proj.active_adapters[0]].weight
    random = torch.Generator().manual_seed(0)
    x = torch.randn(TRIED_ROWS, a.shape[1], generator=random).to(a)
    for factor in factors:
        factor.copy_(0.1 * torch.randn(factor.shape, generator=random))
    before = type(module)
    expected = module(x)
    module.__class__ = now
    try:
        found = module(x)
    finally:
        module.__class__ = before
        for factor, value in zip(factors, kept, strict=True):
            factor.copy_(value)
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
