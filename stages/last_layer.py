"""The last decoder layer's feed-forward half, computed for the tokens alone that the head will read.

What the last layer makes of a token reaches the loss through that token's own logits and nowhere else: its attention
has read the others before. So where half of the tokens train, half of that layer's largest products, forward and
backward, change nothing. The result is the same; an untrained token leaves the layer without its feed-forward part.

    if shorten(causal): decoder(**inputs, kept=some(positions, tokens))
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from packing.fronts import behind, in_front
from stages.loss_head import spread

__all__ = ["KEPT", "lengthen", "shorten", "some"]

KEPT = "kept"
"""The input of a decoder by which it learns which tokens the head reads."""
MULTIPLE = 64
"""Tokens that are kept are a multiple of this: products in 8 bits need 16, tiles of a GPU's products are larger."""
WORTH = 7 / 8
"""Above this share of a batch nothing is left out."""


def some(positions: Tensor, tokens: int) -> Tensor | None:
    """[kept] Sorted: the trained positions of a batch of `tokens` tokens, and of the others the first ones that make it
    a multiple of `MULTIPLE`; None where that is nearly all. On the CPU."""
    kept = -(-len(positions) // MULTIPLE) * MULTIPLE
    if kept > WORTH * tokens:
        return None
    wanted = torch.zeros(tokens, dtype=torch.bool)
    wanted[positions] = True
    wanted[(~wanted).nonzero()[: kept - len(positions), 0]] = True
    return wanted.nonzero()[:, 0]


def shorten(causal: Any) -> bool:
    """Have the last layer of a causal language model listen to `kept`. False where it has no form that is known: a
    feed-forward layer `mlp` without experts. Whether the model then gives the same is to be tried."""
    layer = _last(causal)
    if layer is None:
        return False
    if not isinstance(layer, _LastLayer):
        for front, module in ((_LastLayer, layer), (_Some, layer.mlp)):
            kind: Any = type(module)
            module.__class__ = in_front(front, kind)
        layer.mlp.kept = None
    return True


def lengthen(causal: Any) -> None:
    """Undo `shorten`."""
    layer = _last(causal)
    for module in (layer, layer.mlp):
        module.__class__ = behind(type(module))


def _last(causal: Any) -> Any:
    layers = getattr(causal.get_decoder(), "layers", None)
    layer = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
    mlp = getattr(layer, "mlp", None)
    if not isinstance(layer, GradientCheckpointingLayer) or mlp is None:
        return None
    # Experts are left alone: a router may look at a whole batch.
    routed = any(hasattr(mlp, name) for name in ("experts", "router", "gate"))
    return layer if hasattr(mlp, "down_proj") and not routed else None


class _LastLayer:
    """A decoder layer whose `mlp` is told which tokens to compute: again with each pass, the recomputed one too."""

    mlp: Any

    def forward(self, *inputs: Any, kept: Tensor | None = None, **named: Any) -> Any:
        """As the layer's own."""
        self.mlp.kept = kept
        out = super().forward(*inputs, **named)  # type: ignore[misc]
        self.mlp.kept = None
        return out


class _Some:
    """A feed-forward layer that computes the kept tokens and gives nothing for the others."""

    kept: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens, width] from [1, tokens, width]."""
        if self.kept is None:
            return super().forward(x)  # type: ignore[misc,no-any-return]
        out = super().forward(pick(x[0], self.kept)[None])  # type: ignore[misc]
        placed: Tensor = place(out[0], self.kept, x.shape[1])
        return placed[None]


# Operations of torch's library: torch.compile of torch 2.11 gets the gradients of an `autograd.Function` here wrong,
# and `index_select` would add up its own, row by row, where no position comes twice.


@torch.library.custom_op("regrow::pick", mutates_args=())
def pick(rows: Tensor, positions: Tensor) -> Tensor:
    """[kept, width] The rows at some positions, none twice."""
    return rows.index_select(0, positions)


@torch.library.custom_op("regrow::place", mutates_args=())
def place(rows: Tensor, positions: Tensor, tokens: int) -> Tensor:
    """[tokens, width] Rows at positions, none twice, and zeros elsewhere."""
    return spread(rows, positions, tokens)


@pick.register_fake
def _(rows: Tensor, positions: Tensor) -> Tensor:
    return rows.new_empty(positions.shape[0], rows.shape[1])


@place.register_fake
def _(rows: Tensor, positions: Tensor, tokens: int) -> Tensor:
    return rows.new_empty(tokens, rows.shape[1])


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.tokens = inputs[0].shape[0]


def _pick_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return place(gradient, ctx.saved_tensors[0], ctx.tokens), None


def _place_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return pick(gradient, ctx.saved_tensors[0]), None, None


pick.register_autograd(_pick_backward, setup_context=_keep)
place.register_autograd(_place_backward, setup_context=_keep)
