"""A gated feed-forward layer with LoRA adapters as one operation: down(silu(gate(x)) * up(x)).

Gate and up are the widest activations of a model. Adding an adapter's product to each is a pass over both; here it is
added where silu reads them anyway, forward and backward, and so is what down's adapter adds to the gradient. Their
product, as wide, is not kept for the backward pass, which has it in registers. Gate and up lie beside one another: one
product with x, one of their gradients. See `stages.train.lora_linear` and `stages.train.lora_stack`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packing.fronts import in_front
from stages.train.lora_linear import Fast, add_product, are_plain_now, multiplied_in, narrowed, widened
from stages.train.lora_stack import as_one, stack

__all__ = ["lora_mlp", "quicken"]

LAYERS = ("gate_proj", "up_proj", "down_proj")
TRIED_ROWS = 16
"""Rows of random input, and of large, on which a layer is compared with what it was before."""
MOST_RANK = 128
"""Above this the kernel's tiles do not fit beside one another on every GPU."""
LARGE = 100.0
"""Times which rows are taken besides."""
TOLERANCE = 0.02
"""Largest difference, relative to the largest output: room for bfloat16."""


@torch.library.custom_op("regrow::lora_mlp", mutates_args=())
def lora_mlp(
    x: Tensor, weights: Sequence[Tensor], absmaxes: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, of x's shape; then, for the backward pass, x W' [rows, 2 * width] and scale x A' [rows, 2 * rank] of
    gate and up, beside one another, and scale x A' [rows, rank] of down.

    Weights [out, in], a [rank, in], b [out, rank] and scales are those of gate, up and down, the first two of the same
    shapes; all or none are nf4, with `absmaxes` [blocks of 64] in float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    reduced = narrowed(rows, [each.T for each in a[:2]], scales[:2])
    both = rows.new_empty(len(rows), 2 * len(b[0]))
    wide = as_one(weights[:2], absmaxes[:2], a[:2], b[:2])
    for part, weight in zip(both.chunk(len(wide), 1), wide, strict=True):
        torch.mm(rows, weight.T, out=part)
    if x.is_cuda:
        from stages.kernels import swiglu

        product = swiglu.forward(both, reduced, b[:2])
    else:
        gates, ups = _whole(both, reduced, b)
        product = F.silu(gates) * ups
    reduced_down = narrowed(product, [a[2].T], scales[2:])
    out = reduced_down @ b[2].T
    (weight,) = as_one(weights[2:], absmaxes[2:], a[2:], b[2:])
    add_product(out, product, weight.T)
    return out.view(*x.shape[:-1], out.shape[-1]), both, reduced, reduced_down


@lora_mlp.register_fake
def _(x: Tensor, weights: Any, absmaxes: Any, a: Any, b: Any, scales: Any) -> tuple[Tensor, ...]:
    sizes = (2 * len(b[0]), 2 * len(a[0]), len(a[2]))
    return x.new_empty(*x.shape[:-1], len(b[2])), *(x.new_empty(math.prod(x.shape[:-1]), size) for size in sizes)


@torch.library.custom_op("regrow::lora_mlp_backward", mutates_args=())
def _gradients(
    d_out: Tensor, x: Tensor, weights: Sequence[Tensor], absmaxes: Sequence[Tensor], a: Sequence[Tensor],
    b: Sequence[Tensor], both: Tensor, reduced: Tensor, reduced_down: Tensor, scales: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """The gradients by x, then by every a, then by every b."""
    rows, outs = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    by_down_b = outs.T @ reduced_down
    d_reduced_down = narrowed(outs, [b[2]], scales[2:])
    (weight,) = as_one(weights[2:], absmaxes[2:], a[2:], b[2:])
    d_product = outs @ weight
    if x.is_cuda:
        from stages.kernels import swiglu

        d_both, by_gate_b, by_up_b, by_down_a = swiglu.backward(
            d_product, both, reduced, b[:2], d_reduced_down, a[2].contiguous()
        )
    else:
        d_product.addmm_(d_reduced_down, a[2])
        g, u = _whole(both, reduced, b)
        share = torch.sigmoid(g)
        d_both = torch.cat([d_product * u * share * (1 + g * (1 - share)), d_product * g * share], dim=1)
        by_gate_b, by_up_b = (half.T @ by for half, by in zip(d_both.chunk(2, 1), reduced.chunk(2, 1), strict=True))
        by_down_a = d_reduced_down.T @ (g * share * u)
    halves = zip(d_both.chunk(2, 1), b, scales, strict=False)
    d_reduced = torch.cat([narrowed(half, [each], [scale]) for half, each, scale in halves], dim=1)
    by_x = widened(d_reduced, a[:2])
    wide = as_one(weights[:2], absmaxes[:2], a[:2], b[:2])
    for part, weight in zip(d_both.chunk(len(wide), 1), wide, strict=True):
        add_product(by_x, part, weight)
    by_gate_a, by_up_a = (d_reduced.T @ rows).chunk(2)
    # Copies: an operation's results must not share memory.
    return [by_x.view(x.shape), by_gate_a.clone(), by_up_a.clone(), by_down_a, by_gate_b, by_up_b, by_down_b]


@_gradients.register_fake
def _(d_out: Tensor, x: Tensor, weights: Any, absmaxes: Any, a: Any, b: Any, *_: Any) -> list[Tensor]:
    return [torch.empty_like(each) for each in (x, *a, *b)]


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
    x, both, reduced, reduced_down, *rest = ctx.saved_tensors
    a, b, weights, absmaxes = rest[:3], rest[3:6], rest[6:9], rest[9:]
    by_x, *factors = _gradients(d_out, x, weights, absmaxes, a, b, both, reduced, reduced_down, ctx.scales)
    return by_x, [None] * 3, [None] * ctx.scaled, factors[:3], factors[3:], None


lora_mlp.register_autograd(_backward, setup_context=_keep)


class _FastMlp:
    """The forward pass of a layer with gate_proj, up_proj and down_proj."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """[..., width] from [..., width]."""
        layers = [self.gate_proj, self.up_proj, self.down_proj]
        if not are_plain_now(layers, x):
            return super().forward(x)  # type: ignore[misc,no-any-return]
        a, b, scales = zip(*(layer.factors(x.dtype) for layer in layers), strict=True)
        absmaxes = [layer.absmax for layer in layers if layer.absmax is not None]
        out: Tensor = lora_mlp(x, [layer.base_layer.weight for layer in layers], absmaxes, a, b, scales)[0]
        return out


def quicken(model: nn.Module) -> int:
    """Have every feed-forward layer of this form compute so, if that gives what it gave. Returns how many."""
    found = 0
    for module in model.modules():
        if not isinstance(module, _FastMlp) and _fits(module):
            kind: Any = type(module)
            now = in_front(_FastMlp, kind)
            if _same(module, now):
                stack([module.gate_proj, module.up_proj])
                module.__class__ = now
                found += 1
    return found


def _fits(module: nn.Module) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in LAYERS]
    if not all(isinstance(part, Fast) and part.base_layer.bias is None for part in parts):
        return False
    packed = {part.absmax is None for part in parts}
    pairs = [
        (part.lora_A[part.active_adapters[0]].weight, part.lora_B[part.active_adapters[0]].weight) for part in parts
    ]
    gate, up, _ = (tuple(each.shape for each in pair) for pair in pairs)
    small = all(len(a) <= MOST_RANK for a, _ in pairs)
    return len(packed) == 1 and gate == up and small and hasattr(module, "act_fn")


@torch.no_grad()
def _same(module: Any, now: type) -> bool:
    """Whether the layer gives the same either way; its adapters' zeros filled for the trial."""
    layers = [getattr(module, name) for name in LAYERS]
    factors = [layer.lora_B[layer.active_adapters[0]].weight for layer in layers]
    kept = [factor.clone() for factor in factors]
    base = module.gate_proj.base_layer
    random = torch.Generator().manual_seed(0)
    # Small numbers, and large ones: some models clamp what they find.
    x = torch.randn(2 * TRIED_ROWS, base.in_features, generator=random).to(base.weight.device, multiplied_in(base))
    x[TRIED_ROWS:] *= LARGE
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
    apart, size = ((each.abs().view(2, -1).amax(1)) for each in (found - expected, expected))
    return bool((apart <= TOLERANCE * size).all())
