"""The first half of a gated feed-forward layer with LoRA adapters as one operation: silu(gate(x)) * up(x).

Gate and up are the widest activations of a model. Adding an adapter's product to each is a pass over both; here it is
added where silu reads them anyway, forward and backward, and both lie beside one another: one product with x, one of
their gradients by x. See `stages.train.lora_linear` and `stages.train.lora_stack`.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.train.lora_linear import Fast, are_plain_now
from stages.train.lora_stack import as_one, stack

__all__ = ["lora_swiglu", "quicken"]

TRIED_ROWS = 16
"""Rows of random input on which a layer is compared with what it was before."""
TOLERANCE = 0.02
"""Largest difference, relative to the largest output: room for bfloat16."""


@torch.library.custom_op("regrow::lora_swiglu", mutates_args=())
def lora_swiglu(
    x: Tensor, weights: Sequence[Tensor], absmaxes: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result [..., width]; then, for the backward pass, x W' [rows, 2 * width] and scale x A' [rows, 2 * rank] of
    gate and up, beside one another. Weights, a and b are gate's and up's, of the same shapes."""
    rows = x.reshape(-1, x.shape[-1])
    reduced = rows @ torch.cat([each * scale for each, scale in zip(a, scales, strict=True)]).T
    both = rows.new_empty(len(rows), 2 * len(b[0]))
    weights = as_one(weights, absmaxes, a, b)
    for part, weight in zip(both.chunk(len(weights), 1), weights, strict=True):
        torch.mm(rows, weight.T, out=part)
    if x.is_cuda:
        from stages.kernels import swiglu

        out = swiglu.forward(both, reduced, (b[0], b[1]))
    else:
        gates, ups = _whole(both, reduced, b)
        out = F.silu(gates) * ups
    return out.view(*x.shape[:-1], out.shape[-1]), both, reduced


@lora_swiglu.register_fake
def _(x: Tensor, weights: Any, absmaxes: Any, a: Any, b: Any, scales: Any) -> tuple[Tensor, ...]:
    width, rank, rows = len(b[0]), len(a[0]), x.shape[:-1].numel()
    return x.new_empty(*x.shape[:-1], width), x.new_empty(rows, 2 * width), x.new_empty(rows, 2 * rank)


@torch.library.custom_op("regrow::lora_swiglu_backward", mutates_args=())
def _gradients(
    d_out: Tensor, x: Tensor, weights: Sequence[Tensor], absmaxes: Sequence[Tensor], a: Sequence[Tensor],
    b: Sequence[Tensor], both: Tensor, reduced: Tensor, scales: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by x, gate's a, up's a, gate's b and up's b."""
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1]).contiguous()
    if x.is_cuda:
        from stages.kernels import swiglu

        d_both = swiglu.backward(d_rows, both, reduced, (b[0], b[1]))
    else:
        g, u = _whole(both, reduced, b)
        share = torch.sigmoid(g)
        d_both = torch.cat([d_rows * u * share * (1 + g * (1 - share)), d_rows * g * share], dim=1)
    halves = d_both.chunk(2, 1)
    d_reduced = torch.cat([half @ (each * scale) for half, each, scale in zip(halves, b, scales, strict=True)], dim=1)
    by_x = d_reduced @ torch.cat(list(a))
    weights = as_one(weights, absmaxes, a, b)
    for part, weight in zip(d_both.chunk(len(weights), 1), weights, strict=True):
        by_x.addmm_(part, weight)
    by_gate_a, by_up_a = (d_reduced.T @ rows).chunk(2)
    by_gate_b, by_up_b = (half.T @ by for half, by in zip(halves, reduced.chunk(2, 1), strict=True))
    # Copies: an operation's results must not share memory.
    return by_x.view(x.shape), by_gate_a.clone(), by_up_a.clone(), by_gate_b, by_up_b


@_gradients.register_fake
def _(d_out: Tensor, x: Tensor, weights: Any, absmaxes: Any, a: Any, b: Any, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(each) for each in (x, *a, *b))


def _whole(both: Tensor, reduced: Tensor, b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gate and up with their adapters' products, [rows, width] each."""
    (gates, ups), (by_gate, by_up) = both.chunk(2, 1), reduced.chunk(2, 1)
    return gates + by_gate @ b[0].T, ups + by_up @ b[1].T


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, absmaxes, a, b, ctx.scales = inputs
    ctx.scaled = len(absmaxes)
    ctx.save_for_backward(x, *output[1:], *a, *b, *weights, *absmaxes)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Any, ...]:
    x, both, reduced, *rest = ctx.saved_tensors
    a, b, weights, absmaxes = rest[:2], rest[2:4], rest[4:6], rest[6:]
    by_x, *factors = _gradients(d_out, x, weights, absmaxes, a, b, both, reduced, ctx.scales)
    return by_x, [None] * 2, [None] * ctx.scaled, factors[:2], factors[2:], None


lora_swiglu.register_autograd(_backward, setup_context=_keep)


class _FastMlp:
    """The forward pass of a layer with gate_proj, up_proj and down_proj."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """[..., width] from [..., width]."""
        gate, up = self.gate_proj, self.up_proj
        if not are_plain_now([gate, up], x):
            return super().forward(x)  # type: ignore[misc,no-any-return]
        g, u = gate.active_adapters[0], up.active_adapters[0]
        hidden = lora_swiglu(
            x, [gate.base_layer.weight, up.base_layer.weight],
            [] if gate.absmax is None else [gate.absmax, up.absmax],
            [gate.lora_A[g].weight, up.lora_A[u].weight], [gate.lora_B[g].weight, up.lora_B[u].weight],
            [gate.scaling[g], up.scaling[u]],
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
                stack([module.gate_proj, module.up_proj])
                module.__class__ = now
                found += 1
    return found


@cache  # one class for all layers of a kind, or torch.compile would compile each by itself
def _fast_class(before: type) -> type:
    return type(f"Fast{before.__name__}", (_FastMlp, before), {})


def _fits(module: nn.Module) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj")]
    if not all(isinstance(part, Fast) and part.base_layer.bias is None for part in parts):
        return False
    packed = {part.absmax is None for part in parts}
    shapes = {
        tuple(side[part.active_adapters[0]].weight.shape for side in (part.lora_A, part.lora_B)) for part in parts
    }
    return len(packed) == len(shapes) == 1 and hasattr(module, "act_fn") and hasattr(module, "down_proj")


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
