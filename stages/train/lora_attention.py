"""The queries, keys and values of attention with LoRA adapters as one operation.

The three layers read the same x, so their adapters share one product with it and one in its gradient, and where their
weights lie together (`stages.train.lora_stack`) theirs are one product each way as well. x's gradient is written once
instead of three times and added up.

    quicken(model)      # every attention whose three layers are fused LoRA layers
"""

import ast
import inspect
import math
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from packing.fronts import in_front
from stages.train.lora_linear import Fast, Outputs, add_product, are_plain_now, narrowed, widened
from stages.train.lora_stack import as_one, stack

__all__ = ["lora_qkv", "quicken"]

LAYERS = ("q_proj", "k_proj", "v_proj")


@torch.library.custom_op("regrow::lora_qkv", mutates_args=())
def lora_qkv(
    x: Tensor, weights: Sequence[Tensor], absmaxes: Sequence[Tensor], biases: Sequence[Tensor],
    a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The outputs of all layers beside one another [..., outs], and their scale x A' [rows, ranks], for x [..., in].

    Each layer has its weight [out, in], a [rank, in], b [out, rank] and scale; all or none have a bias [out], and all
    or none are nf4, with `absmaxes` [blocks of 64] in float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    reduced = narrowed(rows, [each.T for each in a], scales)
    out = rows.new_empty(len(rows), sum(map(len, b)))
    for i, (part, by, each) in enumerate(zip(_parts(out, b), _parts(reduced, a), b, strict=True)):
        if biases:
            torch.addmm(biases[i], by, each.T, out=part)
        else:
            torch.mm(by, each.T, out=part)
    weights = as_one(weights, absmaxes, a, b)
    for part, weight in zip(_parts(out, weights), weights, strict=True):
        part.addmm_(rows, weight.T)
    return out.view(*x.shape[:-1], out.shape[1]), reduced


@lora_qkv.register_fake
def _(x: Tensor, weights: Any, absmaxes: Any, biases: Any, a: Any, b: Any, scales: Any) -> tuple[Tensor, Tensor]:
    outs, ranks = (sum(len(each) for each in side) for side in (b, a))
    return x.new_empty(*x.shape[:-1], outs), x.new_empty(math.prod(x.shape[:-1]), ranks)


@torch.library.custom_op("regrow::lora_qkv_backward", mutates_args=())
def _gradients(
    d_out: Tensor, x: Tensor, weights: Sequence[Tensor], absmaxes: Sequence[Tensor],
    a: Sequence[Tensor], b: Sequence[Tensor], reduced: Tensor, scales: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """The gradients by x, then by every a, then by every b."""
    rows, outs = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    d_reduced = torch.empty_like(reduced)
    for part, by, each, scale in zip(_parts(outs, b), _parts(d_reduced, a), b, scales, strict=True):
        by.addmm_(part, each, beta=0, alpha=scale)
    by_x = widened(d_reduced, a)
    weights = as_one(weights, absmaxes, a, b)
    for part, weight in zip(_parts(outs, weights), weights, strict=True):
        add_product(by_x, part, weight)
    by_a = torch.split(d_reduced.T @ rows, [len(each) for each in a])
    by_b = [part.T @ by for part, by in zip(_parts(outs, b), _parts(reduced, a), strict=True)]
    # Copies: an operation's results must not share memory.
    return [by_x.view(x.shape), *(each.clone() for each in by_a), *by_b]


@_gradients.register_fake
def _(d_out: Tensor, x: Tensor, weights: Any, absmaxes: Any, a: Any, b: Any, *_: Any) -> list[Tensor]:
    return [torch.empty_like(each) for each in (x, *a, *b)]


def _parts(beside: Tensor, parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Columns of a tensor, as many for each part as that has rows."""
    return iter(torch.split(beside, [len(part) for part in parts], 1))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, absmaxes, biases, a, b, ctx.scales = inputs
    ctx.counts = [len(each) for each in (weights, absmaxes, biases)]
    ctx.save_for_backward(x, output[1], *weights, *absmaxes, *a, *b)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, _: Any) -> tuple[Any, ...]:
    x, reduced, *rest = ctx.saved_tensors
    count, scaled, biased = ctx.counts
    weights, absmaxes, a, b = _cut(rest, [count, scaled, count, count])
    by_x, *factors = _gradients(d_out, x, weights, absmaxes, a, b, reduced, ctx.scales)
    by_a, by_b = _cut(factors, [count, count])
    return by_x, [None] * count, [None] * scaled, [None] * biased, by_a, by_b, None


def _cut(values: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [list(values[end - count : end]) for count, end in zip(counts, ends, strict=True)]


lora_qkv.register_autograd(_backward, setup_context=_keep)


class _FastAttention:
    """The forward pass of an attention that hands its input to three layers and does nothing else with it."""

    def forward(self: Any, hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        """As the attention's own."""
        layers = [self.q_proj, self.k_proj, self.v_proj]
        if not are_plain_now(layers, hidden_states):
            return super().forward(hidden_states, *inputs, **named)  # type: ignore[misc]
        return super().forward(_outputs(layers, hidden_states), *inputs, **named)  # type: ignore[misc]


def _outputs(layers: Sequence[Any], x: Tensor) -> Outputs:
    bases = [layer.base_layer for layer in layers]
    a, b, scales = zip(*(layer.factors(x.dtype) for layer in layers), strict=True)
    absmaxes = [layer.absmax for layer in layers if layer.absmax is not None]
    biases = [base.bias for base in bases if base.bias is not None]
    out = lora_qkv(x, [base.weight for base in bases], absmaxes, biases, a, b, scales)[0]
    q, k, v = torch.split(out, [len(each) for each in b], -1)
    # A copy of what attention keeps for its backward pass, or all three would be kept with it.
    return Outputs(x.shape, (q, k, v.clone(memory_format=torch.contiguous_format)))


def quicken(model: nn.Module) -> int:
    """Have every attention of this form compute so, and lay its layers' weights together. Returns how many."""
    found = 0
    for module in model.modules():
        if not isinstance(module, _FastAttention) and _fits(module):
            layers = [getattr(module, name) for name in LAYERS]
            for place, layer in enumerate(layers):
                layer.place = place
            stack(layers)
            kind: Any = type(module)
            module.__class__ = in_front(_FastAttention, kind)
            found += 1
    return found


def _fits(module: nn.Module) -> bool:
    kind: Any = type(module)
    layers: list[Any] = [getattr(module, name, None) for name in LAYERS]
    if not all(isinstance(layer, Fast) for layer in layers):
        return False
    biased = {layer.base_layer.bias is None for layer in layers}
    packed = {layer.absmax is None for layer in layers}
    inputs = {layer.lora_A[layer.active_adapters[0]].weight.shape[1] for layer in layers}
    return len(biased) == len(packed) == len(inputs) == 1 and _only_hands_on(kind)


@cache
def _only_hands_on(kind: Any) -> bool:
    """Whether all that an attention's forward pass does with its input is to look at its shape but for the last
    dimension, and to hand it to each of the three layers once, and whether it changes nothing in place. Read off its
    source: some gate or norm by it as well."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, TypeError, SyntaxError):
        return False
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
        return False
    name = function.args.args[1].arg
    calls = [f"self.{layer}({name})" for layer in LAYERS]
    nodes = list(ast.walk(function))
    texts = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call | ast.Subscript)]
    uses = sum(isinstance(node, ast.Name) and node.id == name for node in nodes)
    looks = texts.count(f"{name}.shape[:-1]")
    # OLMo clips q, k and v in place, which parts of one tensor do not allow.
    in_place = any(isinstance(node, ast.Attribute) and node.attr.endswith("_") for node in nodes)
    handed = all(texts.count(call) == 1 for call in calls) and uses == looks + len(calls)
    return name == "hidden_states" and handed and not in_place
