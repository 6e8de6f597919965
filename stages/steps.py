"""The steps of a judged solution, found again in its tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.marks import ROLES, TRAIN_NO
from stages.tables import roles, trains


def ends_of(extra: Mapping[str, Any]) -> list[int]:
    """Where each step ends, in tokens, from what a document's `PackedBins.extra` holds: its `spans`, [spans, 3] with
    end, turn and kind. A step is a turn of raw text that is not marked as untrained (see `stages.tables`)."""
    ends, turns, numbers = np.asarray(extra["spans"], np.int64).reshape(-1, 3).T
    kinds = numbers.astype(np.uint8)
    steps = (roles(kinds) == ROLES.index("text")) & (trains(kinds) != TRAIN_NO)
    found = [int(ends[steps & (turns == turn)].max()) for turn in np.unique(turns[steps])]
    assert len(found) == len(extra["labels"]), "a label for every step"
    return found
