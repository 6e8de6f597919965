"""Training objectives: one a file, named in a recipe by its file's name (`train.objective: sft`).

An objective file declares `OBJECTIVE = Objective(...)`. Both training and evaluation use it, so that the loss that is
reported on held-out text is the loss that was trained.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "LossSum", "Objective", "find", "names"]

Batch = Mapping[str, Any]
"""A collated micro-batch: tensors by name, as `packing.collate` makes them."""
LossSum = Callable[[Batch], "torch.Tensor"]
"""From a prepared batch on the model's device to the sum of its losses."""


@dataclass(frozen=True)
class Objective:
    """What training minimises."""

    version: int
    """Bumped when the same batches and weights would give another loss."""
    prepare: Callable[[Batch], dict[str, Any]]
    """Makes a collated batch ready on the CPU, before it moves to the device."""
    loss: Callable[[Any, Batch], LossSum]
    """`loss(model, batch)` returns the function from a prepared batch to its summed loss. `batch` is an example, with
    which the function may be tried out first."""


def names() -> list[str]:
    """The objectives there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Objective:
    """The objective of that name. Raises UserError listing the choices."""
    if name not in names():
        raise UserError(f"train.objective is {name!r}: choose one of {', '.join(names())}")
    objective = importlib.import_module(f"{__name__}.{name}").OBJECTIVE
    assert isinstance(objective, Objective)
    return objective
