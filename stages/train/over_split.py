"""Optimizers that know whole weights alone, over split ones (`stages.train.adamw`).

    optimizer = OverSplit(lambda: Lion(parameters), parameters)

A step goes through the weights in portions: those of a portion, and their gradients, are float32 for as long as the
optimizer updates them, then they are split again. So training computes in 16 bits without a cast, no second copy of the
weights lies beside them, and what the optimizer sees is what it saw of float32 weights. It must update each weight by
itself: to weights of other portions, which have no gradient meanwhile, the step has not come.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stages.train import adamw

__all__ = ["OverSplit", "as_float32"]

PORTION = 2**28
"""Numbers that are whole at once, or one weight's if it has more: 2 GiB with their gradients. The memory plan does not
count them, as the activations of a pass are gone by then."""


class OverSplit(torch.optim.Optimizer):
    """An optimizer, made by `make`, over `weights` of which some are split. Its state is the optimizer's own, float32
    where that would be of float32 weights."""

    factor: Tensor | None = None
    """What the next step's gradients are multiplied by (a float32 number on the weights' device): their clipping."""

    def __init__(self, make: Callable[[], Any], weights: Iterable[nn.Parameter]) -> None:
        self.weights = list(weights)
        with as_float32(self.weights):
            self.inner = make()
        self.defaults: dict[str, Any] = {}
        self._optimizer_step_pre_hooks: dict[Any, Any] = {}
        self._optimizer_step_post_hooks: dict[Any, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The optimizer's."""
        found: list[dict[str, Any]] = self.inner.param_groups
        return found

    @property
    def parts(self) -> list[Any]:
        """The optimizers it is made of, see `optimizers.parts_of`."""
        found: list[Any] = getattr(self.inner, "parts", [self.inner])
        return found

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The optimizer's."""
        found: dict[Any, Any] = self.inner.state
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any optimizer."""
        self.inner.zero_grad(set_to_none)

    def clip(self, longest: float) -> Tensor:
        """The Euclidean norm of all gradients, float32; the next step scales them down to `longest` if it is more."""
        norm, self.factor = adamw.clipping(self.weights, longest)
        return norm

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        ready = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = {parameter: parameter.grad for parameter in ready}
        for parameter in ready:
            parameter.grad = None
        with torch.no_grad():
            for portion in _portions(ready):
                halves = {p: p.data for p in portion if hasattr(p, "low_bits")}
                for parameter in portion:
                    parameter.data, parameter.grad = _whole(parameter, gradients.pop(parameter), self.factor)
                self.inner.step()
                for parameter in portion:
                    parameter.grad = None
                    vars(parameter).pop("saved_data", None)  # GaLore's in 8 bits keeps the whole weight there
                    if parameter in halves:
                        value, parameter.data = parameter.data, halves[parameter]
                        _split(parameter, value)
        self.factor = None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, as over float32 weights."""
        found: dict[str, Any] = self.inner.state_dict()
        return found

    def load_state_dict(self, state_dict: Any) -> None:
        """As any optimizer."""
        with as_float32(self.weights):
            self.inner.load_state_dict(state_dict)


def _portions(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The weights in order, at most `PORTION` numbers at once."""
    portion: list[nn.Parameter] = []
    held = 0
    for weight in weights:
        if portion and held + weight.numel() > PORTION:
            yield portion
            portion, held = [], 0
        portion.append(weight)
        held += weight.numel()
    if portion:
        yield portion


@contextmanager
def as_float32(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """A block in which split weights look like float32 ones, whose dtype optimizers give to their state. They hold
    nothing then, and take no memory."""
    halves = {p: p.data for p in weights if hasattr(p, "low_bits")}
    for parameter, high in halves.items():
        parameter.data = torch.zeros((), device=high.device).expand(high.shape)
    try:
        yield
    finally:
        for parameter, high in halves.items():
            parameter.data = high


def _whole(parameter: Any, gradient: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """A weight and its gradient in float32, the gradient times `factor`."""
    if hasattr(parameter, "low_bits") and parameter.is_cuda:
        from stages.kernels.halves import join

        return join(parameter.detach(), parameter.low_bits, gradient, factor)
    gradient = gradient.float() if factor is None else gradient.float() * factor
    return (adamw.whole(parameter), gradient) if hasattr(parameter, "low_bits") else (parameter.data, gradient)


def _split(parameter: Any, value: Tensor) -> None:
    """Write a float32 value into a split weight."""
    if parameter.is_cuda:
        from stages.kernels.halves import part_

        part_(value, parameter.detach(), parameter.low_bits)
    else:
        adamw.put(parameter, value)
