"""Single batches of a plan, for what tries the model out before it trains."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from packing.collate import IGNORED, Bin, collate
from stages import lm_head
from stages.train.data import to_device


def one_document(packed: Bin) -> dict[str, Any]:
    """The first document of a packed sequence as a model takes it."""
    length = packed.lengths[0]
    return lm_head.model_inputs(collate([Bin(packed.ids[:length], packed.labels[:length], packed.lengths[:1])]))


def batches(bins: Sequence[Bin], device: str) -> list[dict[str, Any]]:
    """Packed sequences as the model takes them."""
    return [to_device(lm_head.model_inputs(collate([packed])), device) for packed in bins]


def two_documents(packed: Bin, tokens: int, trained: int | None = None) -> dict[str, Any]:
    """A batch to measure on: two documents with so many tokens in all, of which about so many train, or all."""
    ids = np.resize(packed.ids, tokens)
    labels = ids.astype(np.int64)
    each = tokens if trained is None else trained // 2
    for begin, end in ((0, tokens // 2), (tokens // 2, tokens)):
        labels[begin : max(end - each, begin + 1)] = IGNORED
    reference = None if packed.reference is None else np.zeros(tokens, np.float32)
    top = None
    if packed.top is not None:
        likely, log_probs = packed.top
        top = np.resize(likely, (tokens, likely.shape[1])), np.resize(log_probs, (tokens, log_probs.shape[1]))
    lengths = np.array([tokens // 2, tokens - tokens // 2])
    return collate([Bin(ids, labels, lengths, reference=reference, top=top, extra=[*packed.extra[:1]] * 2)])
