"""A linear layer with a LoRA adapter as one operation: y = x W' + scale (x A') B', and its three gradients.

PEFT computes the same in separate steps, each of which reads and writes a whole activation, in float32 where adapters
are. Here the layer's product is added onto the adapter's, which costs less than the other way about: the large product
reads what it adds to while it computes. x is kept once, and W may be nf4: it is then widened for each product and
forgotten. An operation of torch's library, so torch.compile leaves it whole.

    quicken(model)      # every layer that PEFT adapted and this computes exactly
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as AdaptedLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from packing.fronts import in_front
from stages.train.float8 import Float8Linear

__all__ = [
    "Fast", "FastLinear", "Outputs", "add_product", "are_plain_now", "lora_linear", "multiplied_in", "narrowed",
    "quicken", "wide", "widened",
]  # fmt: skip

BLOCK = 64
"""Numbers of an nf4 weight that share a scale."""
HALVED_FROM = 16_384
"""Rows from which on a product is added in halves: fewer were not measured."""
ALIGNED = 16
"""Columns of which halves still begin where the fastest kernels of cuBLAS want it."""


@torch.library.custom_op("regrow::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor, weight: Tensor, absmax: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y [..., out] and scale x A' [rows, rank], for x [..., in], a [rank, in], b [out, rank], and `weight` [out, in],
    or nf4 as bitsandbytes packs it, with `absmax` [blocks of 64] in float32. All others share one dtype."""
    rows = x.reshape(-1, x.shape[-1])
    reduced = narrowed(rows, [a.T], [scale])
    y = x.new_empty(*x.shape[:-1], b.shape[0])  # not a view: some models change in place what a layer gives
    flat = y.view(-1, b.shape[0])
    if bias is None:
        torch.mm(reduced, b.T, out=flat)
    else:
        torch.addmm(bias, reduced, b.T, out=flat)
    add_product(flat, rows, wide(weight, absmax, a, b).T)
    return y, reduced


@lora_linear.register_fake
def _(x: Tensor, weight: Tensor, absmax: Any, bias: Any, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(math.prod(x.shape[:-1]), a.shape[0])


@torch.library.custom_op("regrow::lora_linear_backward", mutates_args=())
def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, a: Tensor, b: Tensor, reduced: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, a and b."""
    outs, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    by_reduced = narrowed(outs, [b], [scale])
    by_x = widened(by_reduced, [a])
    add_product(by_x, outs, wide(weight, absmax, a, b))
    return by_x.view(x.shape), by_reduced.T @ rows, outs.T @ reduced


@_gradients.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Any, a: Tensor, b: Tensor, reduced: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, absmax, _, a, b, scale = inputs
    ctx.save_for_backward(x, weight, absmax, a, b, output[1])
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    by_x, by_a, by_b = _gradients(dy, *ctx.saved_tensors, ctx.scale)
    return by_x, None, None, None, by_a, by_b, None


lora_linear.register_autograd(_backward, setup_context=_keep)


def narrowed(rows: Tensor, factors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """[rows, ranks] The rows [rows, in] by each factor [in, rank] and its scale, beside one another."""
    if len(set(scales)) > 1:
        factors, scales = [each * scale for each, scale in zip(factors, scales, strict=True)], [1.0]
    whole = torch.cat([each.T for each in factors]).T if len(factors) > 1 else factors[0]
    return torch.addmm(rows.new_empty(()), rows, whole, beta=0, alpha=scales[0])


def widened(reduced: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """[rows, in] `reduced` [rows, ranks] by each a [rank, in], one under another. Laid out by columns: for so small an
    inner dimension cuBLAS takes five times as long otherwise (16,384 rows of 4,096 on an H200: 0.17 and 0.03 ms)."""
    return reduced @ torch.cat([a.T for a in factors], 1).T


def add_product(onto: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [rows, in] right [in, width] to `onto` [rows, width], in two halves of its columns where there are many
    rows: what cuBLAS takes for the whole is up to 6 % slower (16,384 rows, 28,672 to 4,096, on an H200: 6.00 and 5.62
    ms; 14,336 to 4,096: 2.94 and 2.84 ms)."""
    halves = 2 if len(onto) >= HALVED_FROM and onto.shape[1] % ALIGNED == 0 else 1
    for part, columns in zip(onto.chunk(halves, 1), right.chunk(halves, 1), strict=True):
        part.addmm_(left, columns)


def wide(weight: Tensor, absmax: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """The weight [out, in] in the adapter's dtype."""
    if absmax is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit  # noqa: F401  (registers the operation)

    shape = [b.shape[0], a.shape[1]]
    wide: Tensor = torch.ops.bitsandbytes.dequantize_4bit(weight, absmax, BLOCK, "nf4", shape, a.dtype)
    return wide


def multiplied_in(base: Any) -> torch.dtype:
    """The dtype of a linear layer's product, whose weight may be nf4."""
    dtype: torch.dtype = base.weight.dtype if base.weight.is_floating_point() else base.compute_dtype
    return dtype


class Outputs(NamedTuple):
    """What layers give that read the same x, computed at once: it takes the place of x, and each picks its own."""

    shape: torch.Size
    """That of x."""
    parts: tuple[Tensor, ...]


class Fast:
    """The forward pass of PEFT's adapted layers, while they are nothing but W x + scale B A x."""

    absmax: Tensor | None
    base_layer: Any
    place: int
    """Which of the `Outputs` is this layer's."""

    def is_plain_now(self: Any, x: Tensor) -> bool:
        """Whether the adapter is switched on and beside the weight, and the input of a dtype to multiply in: that of
        the weight, which the adapter, held in float32 by some optimizers, is narrowed to."""
        if self.disable_adapters or self.merged:
            return False
        device, base = x.device.type, self.base_layer
        if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
            return False
        if x.dtype == multiplied_in(base):
            return True
        return self.absmax is not None and x.dtype == self.lora_A[self.active_adapters[0]].weight.dtype

    def factors(self: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """a [rank, in] and b [out, rank], and what their product is multiplied by."""
        (name,) = self.active_adapters
        return self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype), self.scaling[name]

    def forward(self: Any, x: Tensor | Outputs, *args: Any, **kwargs: Any) -> Tensor:
        """[..., out] from [..., in]."""
        if isinstance(x, Outputs):
            mine: Tensor = x.parts[self.place]
            return mine
        if args or kwargs or not self.is_plain_now(x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        a, b, scale = self.factors(x.dtype)
        base = self.base_layer
        if isinstance(base, Float8Linear):
            y: Tensor = base(x)
            rows: Tensor = torch.addmm(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]) @ a.T, b.T, alpha=scale)
            return rows.view(y.shape)
        y = lora_linear(x, base.weight, self.absmax, base.bias, a, b, scale)[0]
        return y


def are_plain_now(layers: Sequence[Any], x: Tensor) -> bool:
    """Whether all of them are `Fast` and compute so now; merging puts plain layers in their place."""
    return all(isinstance(layer, Fast) and layer.is_plain_now(x) for layer in layers)


class FastLinear(Fast, AdaptedLinear):  # type: ignore[misc]
    """Over a linear layer."""


def quicken(model: nn.Module) -> int:
    """Have every adapted layer that is a plain LoRA without dropout over a linear layer compute so: the adapter of the
    layer's dtype or in float32, the layer maybe in nf4. Returns how many."""
    found = 0
    for module in model.modules():
        # An adapter of a mixture's fused experts wraps no layer with a weight: `stages.train.lora_experts`.
        if isinstance(module, LoraLayer) and hasattr(module.base_layer, "weight") and _is_plain(module):
            fast, module.absmax = _fast_class(module)
            if fast is not None:
                module.__class__ = fast
                found += 1
    return found


def _fast_class(module: Any) -> tuple[type | None, Tensor | None]:
    """What an adapted layer becomes, and the scales of its weight if that is nf4."""
    weight = module.base_layer.weight
    if weight.requires_grad:
        return None, None
    if type(module) is AdaptedLinear and type(module.base_layer) is nn.Linear:
        held = module.lora_A[module.active_adapters[0]].weight.dtype
        return (FastLinear if held in (weight.dtype, torch.float32) else None), None
    state = getattr(weight, "quant_state", None)
    if state is None or state.quant_type != "nf4" or state.blocksize != BLOCK:
        return None, None
    return _over_4_bits(), _scales(state)


def _over_4_bits() -> type:
    from peft.tuners.lora.bnb import Linear4bit

    return in_front(Fast, Linear4bit)


def _scales(state: Any) -> Tensor:
    """[blocks] What each block of an nf4 weight is multiplied by, float32, when they are quantized themselves too."""
    if not state.nested:
        return state.absmax  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_blockwise

    scales: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float()


def _is_plain(module: Any) -> bool:
    """Whether an adapted layer is W x + scale B A x and nothing else."""
    names = module.active_adapters
    return (
        len(names) == 1
        and list(module.lora_A) == names
        and not module.lora_variant
        and isinstance(module.lora_dropout[names[0]], nn.Identity)
        and module.lora_B[names[0]].bias is None
        and not module.merged
    )
