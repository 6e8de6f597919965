"""The weights that train, by name: taken, averaged over the steps, and put back; whole, also where they are split
(`stages.train.adamw`)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from stages.train import adamw


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def put(weights: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Write values into weights of the same names."""
    for name, weight in weights.items():
        adamw.put(weight, values[name])


class Average:
    """An exponential moving average of the trained weights: e ← decay e + (1 - decay) w after every step, from their
    start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = trained(model)
        self.averages = {name: adamw.whole(weight).clone() for name, weight in self.weights.items()}

    def after(self, step: int) -> None:
        """Take the step's weights in."""
        for name, weight in self.weights.items():  # one by one: a split weight is whole for as long only
            self.averages[name].lerp_(adamw.whole(weight), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which the model holds the averages, and these are put aside in their place."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self.weights.items():
            held = adamw.whole(weight).clone()
            adamw.put(weight, self.averages[name])
            self.averages[name].copy_(held)

    def finish(self) -> None:
        """Put the averages into the model."""
        put(self.weights, self.averages)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages."""
        return self.averages

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put the averages back."""
        for name, average in self.averages.items():
            average.copy_(state[name])
