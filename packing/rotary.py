"""Rotary positions whose frequencies depend on how long a text is, found for each document of a packed batch.

Models that were stretched have two sets of frequencies, one for texts up to the length they were pretrained on and one
for longer ones (longrope, arXiv:2402.13753: Phi-3 and Phi-4 of 128k), or widen them as a text grows (dynamic). There
transformers goes by the last position in the whole batch, so one long document would change what the others are.

    by_document(model)      # nothing happens to other models
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["by_document", "plain_length"]

KINDS = ("longrope", "dynamic")
"""What transformers calls them."""


def by_document(model: nn.Module) -> None:
    """Have rotary embeddings choose their frequencies for every document of a packed batch by its own length."""
    for module in model.modules():
        if getattr(module, "rope_type", None) in KINDS and not isinstance(module, _ByDocument):
            kind: Any = type(module)
            module.__class__ = _in_front(kind)


def plain_length(config: Any) -> int | None:
    """The longest text that a model, by its config, gives the plain frequencies; None where all have the same."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in KINDS:
        return None
    stretched = rope["rope_type"] == "longrope"
    return int(rope["original_max_position_embeddings"] if stretched else config.max_position_embeddings)


class _ByDocument:
    """The forward pass of a rotary embedding, in front of its own."""

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        """Cosines and sines [1, T, .] for packed positions [1, T], which start at 0 in every document."""
        if len(position_ids) > 1:  # not packed
            return super().forward(x, position_ids)  # type: ignore[misc]
        plain = plain_length(self.config)
        assert plain is not None
        found = self._alone(x, position_ids.clamp(max=plain - 1))
        for begin, end in _longer(position_ids[0], plain):
            for whole, own in zip(found, self._alone(x, position_ids[:, begin:end]), strict=True):
                whole[:, begin:end] = own
        return found

    def _alone(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        """What a model that has read nothing longer gives these positions."""
        super().forward(x, position_ids.new_zeros(1, 1))  # type: ignore[misc]
        return super().forward(x, position_ids)  # type: ignore[misc]


def _longer(positions: Tensor, plain: int) -> Iterator[tuple[int, int]]:
    """Where documents longer than `plain` begin and end, from packed positions [T]."""
    last = F.pad(positions[1:] != positions[:-1] + 1, (0, 1), value=True)
    ends = (last & (positions >= plain)).nonzero()[:, 0]
    begins = (ends - positions[ends]).clamp(min=0)  # where generation goes on from a cache, its beginning is not here
    return zip(begins.tolist(), (ends + 1).tolist(), strict=True)


@cache
def _in_front(kind: Any) -> type:
    return type(f"ByDocument{kind.__name__}", (_ByDocument, kind), {})
