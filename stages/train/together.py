"""Several optimizers over different weights as one: `Together([muon, adamw])`."""

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Together"]


class Together(torch.optim.Optimizer):
    """`parts`, each over weights of its own, as one optimizer over all of them."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.defaults: dict[str, Any] = {}
        self.param_groups = [group for part in parts for group in part.param_groups]
        self._optimizer_step_pre_hooks: dict[Any, Any] = {}
        self._optimizer_step_post_hooks: dict[Any, Any] = {}

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """All parts'."""
        return {key: value for part in self.parts for key, value in part.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any optimizer."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Each part's own, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: Any) -> None:
        """As any optimizer."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
