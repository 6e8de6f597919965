"""What transformers makes of a whole batch's positions, found for each document of a packed batch by itself.

Models that were stretched have two sets of rotary frequencies, one for texts up to the length they were pretrained on
and one for longer ones (longrope, arXiv:2402.13753: Phi-3 and Phi-4 of 128k), or widen them as a text grows (dynamic);
some in one kind of their layers only (Gemma 3 has a set for each). There transformers goes by the last position in the
whole batch, so one long document would change what the others are.

Llama 4's layers without rotary positions scale their queries by how many times 8,192 tokens are before them
(arXiv:2501.19399). There transformers counts from the beginning of the row.

    by_document(model)      # nothing happens to other models
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packing.fronts import in_front

__all__ = ["by_document", "plain_lengths"]

KINDS = ("longrope", "dynamic")
"""What transformers calls them."""


def by_document(model: nn.Module) -> None:
    """Have rotary embeddings choose their frequencies for every document of a packed batch by its own length, and
    layers that scale their queries by place go by the place in the document."""
    for module in model.modules():
        rope: Any = getattr(module, "rope_type", None)
        attention: Any = getattr(module, "self_attn", None)
        if any(kind in KINDS for kind in (rope.values() if isinstance(rope, dict) else [rope])):
            _put(_Rotary, module)
        elif getattr(attention, "attn_temperature_tuning", False) and not attention.use_rope:
            _put(_Scaling, module)


def plain_lengths(config: Any) -> dict[str | None, int]:
    """The longest text that a model, by its config, gives the plain frequencies, for each kind of its layers that has
    others for longer ones; the kind is None where all layers have the same."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    kinds = {None: rope} if "rope_type" in rope else rope
    found: dict[str | None, int] = {}
    for kind, own in kinds.items():
        if isinstance(own, dict) and own.get("rope_type") in KINDS:
            stretched = own["rope_type"] == "longrope"
            found[kind] = int(own["original_max_position_embeddings"] if stretched else config.max_position_embeddings)
    return found


class _Rotary:
    """The forward pass of a rotary embedding, in front of its own."""

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Cosines and sines [1, T, .] for packed positions [1, T], which start at 0 in every document."""
        kind = {} if layer_type is None else {"layer_type": layer_type}
        plain = plain_lengths(self.config).get(layer_type)
        if plain is None or len(position_ids) > 1:  # or not packed
            return super().forward(x, position_ids, **kind)  # type: ignore[misc]
        found = self._alone(x, position_ids.clamp(max=plain - 1), kind)
        for begin, end in _longer(position_ids[0], plain):
            for whole, own in zip(found, self._alone(x, position_ids[:, begin:end], kind), strict=True):
                whole[:, begin:end] = own
        return found

    def _alone(self: Any, x: Tensor, position_ids: Tensor, kind: dict[str, str]) -> Any:
        """What a model that has read nothing longer gives these positions."""
        super().forward(x, position_ids.new_zeros(1, 1), **kind)  # type: ignore[misc]
        return super().forward(x, position_ids, **kind)  # type: ignore[misc]


def _longer(positions: Tensor, plain: int) -> Iterator[tuple[int, int]]:
    """Where documents longer than `plain` begin and end, from packed positions [T]."""
    last = F.pad(positions[1:] != positions[:-1] + 1, (0, 1), value=True)
    ends = (last & (positions >= plain)).nonzero()[:, 0]
    begins = (ends - positions[ends]).clamp(min=0)  # where generation goes on from a cache, its beginning is not here
    return zip(begins.tolist(), (ends + 1).tolist(), strict=True)


class _Scaling:
    """The forward pass of a decoder layer that scales its queries by place, in front of its own."""

    def forward(
        self: Any, x: Tensor, *inputs: Any, position_ids: Tensor, past_key_values: Any = None, **named: Any
    ) -> Any:
        """As the layer's own, for packed positions [1, T]."""
        if past_key_values is None and len(position_ids) == 1:
            past_key_values = _Before(position_ids[0])
        named |= {"position_ids": position_ids, "past_key_values": past_key_values}
        return super().forward(x, *inputs, **named)  # type: ignore[misc]


class _Before:
    """An empty cache that a layer asks how many tokens were before the row, to count its own from there: for each token
    of a packed row, so many that its place in the document comes out."""

    def __init__(self, positions: Tensor) -> None:
        self.before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer: int) -> Tensor:
        """[T] At most 0."""
        return self.before

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Nothing is kept."""
        return key, value


def _put(front: type, module: nn.Module) -> None:
    if not isinstance(module, front):
        kind: Any = type(module)
        module.__class__ = in_front(front, kind)
