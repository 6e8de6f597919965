"""Activation checkpointing: what of the forward pass is kept for the backward pass, and what is computed anew.

none        everything is kept
selective   results of matrix products and attention are kept, all between them (norms, rotations, activations) is
            computed anew: nearly as fast as none (torch's selective activation checkpointing)
full        each decoder layer's input is kept (arXiv:1604.06174): a fourth more arithmetic
offloaded   the same, and the inputs wait in the machine's memory instead of the GPU's

recompute(model, "selective")       # from now on, in training mode
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

Mode = Literal["none", "selective", "full", "offloaded"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""From the fastest to the smallest."""

KEPT = (
    *(f"aten::{name}" for name in ("mm", "addmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm")),
    *(f"aten::_scaled_dot_product_{kind}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention")),
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
    *("flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward", "flash_attn_3::fwd"),
    *(
        "regrow::hopper_attention",
        "regrow::flash_attn_4",
        "regrow::lora_linear",
        "regrow::lora_qkv",
        "regrow::lora_mlp",
    ),
    "transformers::grouped_mm_fallback",
    *("bitsandbytes::gemm_4bit", "bitsandbytes::int8_scaled_mm", "bitsandbytes::int8_mixed_scaled_mm"),
)
"""The operations, by namespace and name, whose results selective checkpointing keeps: most of a layer's arithmetic in a
small part of its activations. Not batched products: attention in explicit steps makes heads x tokens x tokens."""

TRIED = 64
"""Tokens on which a mode is tried."""
TOLERANCE = 1e-2
"""Largest difference of a gradient, relative to it: kernels may add up in another order."""

Recompute = Callable[..., Any]


def layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be recomputed: for a language model, its decoder layers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(model: nn.Module, mode: Mode, compiled: bool = False) -> None:
    """Have the decoder layers, in training mode, keep what `mode` says. A model without such layers takes only none.

    Layers that will be `compiled` recompute within their own graphs: around them, `checkpoint` would keep torch.compile
    out. Where a graph breaks, such a layer runs as if it were not compiled.
    """
    assert mode == "none" or layers(model), "nothing to recompute"
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    inside = compiled and mode != "none"
    _use(model, None if mode == "none" or inside else _functions(mode, on_gpu))
    for layer in layers(model):
        kind: Any = type(layer)
        plain = kind.plain if issubclass(kind, _Recomputing) else kind
        layer.__class__ = _recomputing_class(plain, mode) if inside else plain


class _Recomputing:
    """A decoder layer that recomputes within its own forward pass."""

    recomputing: Recompute
    plain: type
    """The layer's own class."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        """As the layer's own."""
        if not self.training:
            return super().forward(*inputs, **named)  # type: ignore[misc]
        return self.recomputing(super().forward, *inputs, **named)  # type: ignore[misc]


@cache  # one class for all layers of a kind, or torch.compile would compile each by itself
def _recomputing_class(before: type, mode: Mode) -> type:
    named = {"recomputing": staticmethod(_functions(mode, False)), "plain": before}
    return type(f"Recomputing{before.__name__}", (_Recomputing, before), named)


@contextmanager
def counting(model: nn.Module, mode: Mode) -> Iterator[Callable[[], int]]:
    """A block in which forward passes in training mode hold what they would under `mode`, and a function that gives the
    bytes that selective checkpointing holds aside, where autograd's hooks do not see them. No backward pass works."""
    counter = _Counter()  # type: ignore[no-untyped-call]
    contexts = partial(_pair, counter)
    offloaded = {"none": None, "offloaded": _functions("offloaded", False)}
    _use(model, offloaded.get(mode, partial(checkpoint, use_reentrant=False, context_fn=contexts)))
    counter.counts = mode == "selective"
    try:
        yield lambda: counter.bytes
    finally:
        _use(model, None)


def works(model: nn.Module, mode: Mode, forward: Callable[[int], torch.Tensor]) -> bool:
    """Whether the first layer's gradients under `mode` are what they are under none, on a few tokens. Selective
    checkpointing fails where a model changes in place what was kept; torch notices."""
    parameters = next(filter(None, map(_learning, (*layers(model), model))))
    training, found = model.training, []
    model.train()
    try:
        for each in ("none", mode):
            recompute(model, each)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                loss = forward(TRIED)
            found.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    finally:
        recompute(model, "none")
        model.train(training)
    # Of several, for an adapter's A learns nothing at first.
    apart = torch.stack([(one - other).float().norm() for one, other in zip(*found, strict=True)]).norm()
    return bool(apart <= TOLERANCE * torch.stack([one.float().norm() for one in found[0]]).norm())


def _learning(part: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def _pair(counter: "_Counter") -> tuple[Any, Any]:
    return counter, nullcontext()


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the results that selective checkpointing would keep."""

    counts = True
    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.counts and func in _kept():
            self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def _use(model: nn.Module, function: Recompute | None) -> None:
    for layer in layers(model):
        layer.gradient_checkpointing = function is not None
        layer._gradient_checkpointing_func = function


def _functions(mode: Mode, on_gpu: bool) -> Recompute:
    """How transformers' layers call their own forward pass: `function(forward, *inputs)`."""
    plain = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        return partial(plain, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    return partial(_with_inputs_aside, plain, on_gpu) if mode == "offloaded" else plain


def _with_inputs_aside(plain: Recompute, on_gpu: bool, forward: Callable[..., Any], *inputs: Any) -> Any:
    with torch.autograd.graph.save_on_cpu(pin_memory=on_gpu):
        return plain(forward, *inputs)


def _policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _kept() else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _kept() -> frozenset[Any]:
    """`KEPT` as far as the libraries that define them are loaded: they are, when a model that uses them is."""
    found = set()
    for name in KEPT:
        space, _, short = name.partition("::")
        packet = getattr(getattr(torch.ops, space), short, None)
        found |= {getattr(packet, overload) for overload in packet.overloads()} if packet is not None else set()
    return frozenset(found)
