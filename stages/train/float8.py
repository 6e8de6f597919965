"""Linear layers whose products are of 8-bit floats, on GPUs that have them (Hopper, Ada and later): precision fp8.

Each operand is scaled by one number so that its largest value is the format's largest (arXiv:2209.05433): activations
and weights to e4m3, gradients to e5m2. Weights and everything between the products stay as they are. The scaling is
made of plain operations that torch.compile fuses with what stands before; without it fp8 is slower than bf16.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Float8Linear", "choices", "convert", "float8_linear", "only"]

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""The products take sizes that are multiples of this."""
LARGEST_CHANGE = 0.005
"""Of a loss, relative, by computing in 8 bits. What shows before training is there after it, too."""


def scaled(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The value in 8 bits, and what to multiply it with to have it back."""
    limit = torch.finfo(dtype).max
    scale = limit / value.abs().amax().float().clamp(min=1e-12)
    return (value.float() * scale).clamp(-limit, limit).to(dtype), scale.reciprocal()


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a [m, k] in rows times b [k, n] in columns. `fast` adds up in fewer bits, which gradients do without."""
    if not a.is_cuda:  # the oracle's path, and the CPU's
        return ((a.float() * a_scale) @ (b.float() * b_scale)).to(dtype)
    out: Tensor = torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)
    return out


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = scaled(x, FORWARD)
        w8, w_scale = scaled(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return _product(x8, x_scale, w8.t(), w_scale, x.dtype, True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        (dy,) = gradients
        dy8, dy_scale = scaled(dy, BACKWARD)
        by_x = _product(dy8, dy_scale, w8.t().contiguous().t(), w_scale, dy.dtype, False)
        by_weight = _product(dy8.t().contiguous(), dy_scale, x8.t().contiguous().t(), x_scale, dy.dtype, False)
        return by_x, by_weight


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = scaled(x, FORWARD)
        w8, w_scale = scaled(weight, FORWARD)
        ctx.save_for_backward(weight)
        return _product(x8, x_scale, w8.t(), w_scale, x.dtype, True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        (dy,) = gradients
        dy8, dy_scale = scaled(dy, BACKWARD)
        w8, w_scale = scaled(weight, FORWARD)
        return _product(dy8, dy_scale, w8.t().contiguous().t(), w_scale, dy.dtype, False), None


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., out] from x [..., in] and weight [out, in], in the dtype of x."""
    function = _Trained if weight.requires_grad else _Frozen
    y: Tensor = function.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call]
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class Float8Linear(nn.Linear):
    """A linear layer computed in 8 bits, unless the number of its rows is no multiple of 16."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] from [..., in]."""
        if math.prod(x.shape[:-1]) % MULTIPLE:
            return super().forward(x)
        return float8_linear(x, self.weight, self.bias)


def convert(layers: Iterable[nn.Module]) -> int:
    """Have all linear layers in some decoder layers that can compute in 8 bits do so. Returns how many."""
    found = [linear for layer in layers for linear in _able(layer).values()]
    only(found, found)
    return len(found)


def choices(layers: Sequence[nn.Module]) -> dict[str, list[nn.Linear]]:
    """Which linear layers of a model's decoder layers could compute in 8 bits, by what to call them: from all to few.

    For what they compute, the first and the last decoder layer add most to the loss, then attention, then the layers
    whose outputs are added to the residual stream.
    """
    each = [_able(layer) for layer in layers]
    inner, quarter = each[1:-1], -(-len(each) // 4)
    found = {
        "all": each,
        "without the first and last decoder layer": inner,
        "of feed-forward layers, without the first and last decoder layer": [_feed_forward(able) for able in inner],
        "those that widen, without the first and last decoder layer": [_widening(able) for able in inner],
        "those that widen, of the middle half of decoder layers": [
            _widening(able) for able in each[quarter : len(each) - quarter]
        ],
    }
    return {name: chosen for name, those in found.items() if (chosen := [m for able in those for m in able.values()])}


def only(able: Iterable[nn.Linear], chosen: Iterable[nn.Linear]) -> None:
    """Of the layers that can, have those that are chosen compute in 8 bits, and the others as they always did."""
    wanted = {id(linear) for linear in chosen}
    for linear in able:
        linear.__class__ = Float8Linear if id(linear) in wanted else nn.Linear


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """A block in which all layers compute as they always did: where what is tried is not what 8 bits do to it."""
    converted = [module for module in model.modules() if type(module) is Float8Linear]
    only(converted, [])
    try:
        yield
    finally:
        only(converted, converted)


def _able(layer: nn.Module) -> dict[str, nn.Linear]:
    """Its linear layers by name, but for those of adapters and those whose sizes do not allow it."""
    return {
        name: module
        for name, module in layer.named_modules()
        if type(module) in (nn.Linear, Float8Linear)
        and ".lora_" not in name
        and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
    }


def _feed_forward(able: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Those outside of attention, as transformers names it."""
    return {name: m for name, m in able.items() if "attn" not in name and "attention" not in name}


def _widening(able: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    return {name: m for name, m in _feed_forward(able).items() if m.out_features > m.in_features}
