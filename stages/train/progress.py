"""A training's figures told while it runs: to the terminal, the dashboard and the trackers."""

import time
from typing import Any

import torch

from stages.train.training import Training

TELL_SECONDS = 0.2
"""Progress is told at most this often."""


class Progress:
    """How fast a training is, from one telling to the next."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.speed: dict[str, Any] = {}
        """Tokens a second, model FLOP utilisation and memory, as last told."""
        self._at, self._step = time.monotonic(), -1

    def tell(self, step: int, **metrics: Any) -> None:
        """Say something of a step."""
        self.training.work.tell(step, len(self.training.steps), "steps", **metrics)

    def tell_figures(self, entry: dict[str, Any]) -> None:
        """Say a step's figures, unless the last ones are only just told."""
        now, step, training = time.monotonic(), entry["step"], self.training
        if now - self._at < TELL_SECONDS and step < len(training.steps) and self._step >= 0:
            return
        done = range(self._step if self._step >= 0 else step - 1, step)
        seconds = max(now - self._at, 1e-9)
        self.speed = {"tokens_per_second": round(sum(map(training.steps.tokens, done)) / seconds, 1)}
        if training.peak:
            flops = sum(map(training.flops, done)) / seconds / training.group.size
            self.speed["model_flop_utilisation"] = round(flops / training.peak, 4)
        if training.device == "cuda":
            self.speed["memory_bytes"] = torch.cuda.max_memory_allocated()
        self._at, self._step = now, step
        figures = {name: value for name, value in entry.items() if name not in ("step", "tokens", "trained_tokens")}
        self.tell(step, **figures, **self.speed)
