"""What happens when the loss jumps: noted, stopped, or rolled back without the batch that did it.

A loss or gradient norm is a spike when it lies more than `SIGMAS` standard deviations above the mean of the `WINDOW`
steps before it (the rule of OLMo-core's SkipStepOptimizer). What is no number is always one, but for gradients that
were too large for fp16: that step is skipped, the next ones are scaled by less, and only a long row of such steps is
a spike.

To roll back is to go to the newest checkpoint before the step and train again with that step left out: no forward pass,
no update, the learning rate moves on. Steps before it come out as they did, so the result is the one of a run that had
left the step out from the beginning, whenever checkpoints were written.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WINDOW = 128
"""Steps whose mean and deviation a step is compared with."""
FEWEST = 64
"""Steps that must have been seen before anything is called a spike."""
SIGMAS = 6.0
"""Standard deviations above the mean from which on a value is a spike."""
LEAST = 0.01
"""A rise below this is no spike, however little the steps before deviate: a loss at zero does by nothing."""
MOST_SKIPPED = 24
"""Steps that fp16 may skip one after another, each of which halves the scale: from 65536, where it starts, to 1/256."""
MOST_LEFT_OUT = 10
"""Steps that may be left out before the training itself is called broken."""
WATCHED = ("loss", "grad_norm")


class Upset(RuntimeError):
    """A step whose loss or gradient is no number or a spike, and that must not stay in the training."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position
        """Of the step, from 0."""


@dataclass(frozen=True)
class Spike:
    """A figure that jumped."""

    text: str
    """`the loss is nan`"""
    finite: bool


@dataclass
class Watch:
    """Looks at every step's figures in order."""

    past: dict[str, deque[float]] = field(default_factory=lambda: {name: deque(maxlen=WINDOW) for name in WATCHED})
    skipped: int = 0
    """Steps that were skipped since the last one that was not."""

    @classmethod
    def after(cls, history: Iterable[Mapping[str, Any]]) -> "Watch":
        """As it was after the steps of a log."""
        watch = cls()
        for entry in history:
            watch.look(entry)
        return watch

    def look(self, entry: Mapping[str, Any]) -> Spike | None:
        """What is wrong with a step, if anything is."""
        for name in WATCHED:
            if not math.isfinite(entry[name]):
                return Spike(f"the {name} is {entry[name]}", finite=False)
        self.skipped = self.skipped + 1 if entry.get("skipped") else 0
        if self.skipped > MOST_SKIPPED:
            return Spike(f"the gradient is no number at any scale, {self.skipped} times in a row,", finite=False)
        if self.skipped:
            return None
        found = next(filter(None, (self._spike(name, entry[name]) for name in WATCHED)), None)
        for name in WATCHED:
            self.past[name].append(entry[name])
        return found

    def _spike(self, name: str, value: float) -> Spike | None:
        past = self.past[name]
        if len(past) < FEWEST:
            return None
        window = np.fromiter(past, np.float64)
        mean, deviation = float(window.mean()), float(window.std())
        if value <= mean + max(SIGMAS * deviation, LEAST):
            return None
        return Spike(
            f"the {name} is {value:.4g}, after {mean:.4g} ± {deviation:.2g} over {len(past)} steps,", finite=True
        )
