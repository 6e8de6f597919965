"""What happens between optimizer steps: restarts, layer sampling, averages, looks at the held-out loss.

    between = make(model, config, optimizer, total, look, tell)
    trainer.add_callback(between)         # runs its parts at every step's ends
    between.state_dict()                  # what a checkpoint must hold of them
    between.finish()                      # after the last step: the model holds the weights that are written

A part has some of: `before(step)` (steps done so far), `after(step)`, `finish()`, `state_dict()` and
`load_state_dict(state)`, `stop` (whether training is to end here).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.objectives import LossSums
from stages.train import TrainConfig, optimizers
from stages.train.freezing import LayerSampling
from stages.train.schedules import steps_of


class Between(TrainerCallback):  # type: ignore[misc]
    """All parts of a training, run in order."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._each("before", state.global_step)
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._each("after", state.global_step)
        control.should_training_stop |= self.stop
        return control

    def finish(self) -> None:
        """Put the weights that are to be written into the model."""
        self._each("finish")

    @property
    def stop(self) -> bool:
        """Whether training ends before its last step."""
        return any(getattr(part, "stop", False) for part in self.parts.values())

    @property
    def record(self) -> dict[str, Any]:
        """What is told of them, JSON."""
        return {name: part.record for name, part in self.parts.items() if hasattr(part, "record")}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {name: part.state_dict() for name, part in self.parts.items() if hasattr(part, "state_dict")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, each in state.items():
            self.parts[name].load_state_dict(each)

    def _each(self, what: str, *arguments: Any) -> None:
        for part in self.parts.values():
            if hasattr(part, what):
                getattr(part, what)(*arguments)


def make(
    model: nn.Module,
    config: TrainConfig,
    optimizer: Any,
    total: int,
    look: Callable[[], float] | None,
    tell: Callable[[int, float], None],
) -> Between:
    """The parts that a recipe asks for. `look` measures the held-out loss of the model as it stands."""
    parts: dict[str, Any] = {}
    if config.full.lisa is not None:
        parts["lisa"] = LayerSampling(model, config.full.lisa, config.seed, optimizer)
    if config.lora.restart_every is not None:
        parts["restarts"] = Restarts(model, config.lora.restart_every, total, config.seed, optimizer)
    if config.ema is not None:
        parts["ema"] = Average(model, config.ema)
    if look is not None:
        assert config.evaluate_every is not None
        every = steps_of(config.evaluate_every, total)
        parts["heldout"] = Looks(model, config, optimizer, every, total, look, parts.get("ema"), tell)
    return Between(parts)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Restarts:
    """ReLoRA (arXiv:2307.05695): every so often the adapter is added to the weights and starts anew, with a fresh
    optimizer, so that a sum of low ranks can become a high one."""

    def __init__(self, model: nn.Module, every: int, total: int, seed: int, optimizer: Any) -> None:
        self.every, self.total, self.seed, self.optimizer = every, total, seed, optimizer
        self.layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}

    def after(self, step: int) -> None:
        """Restart, if it is time."""
        if step % self.every or step >= self.total:
            return
        self.finish()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 1_000_003 + step)
            for layer in self.layers.values():
                layer.reset_lora_parameters("default", True)
        optimizers.forget(self.optimizer, [p for layer in self.layers.values() for p in _adapter(layer)])

    def finish(self) -> None:
        """Add the adapter to the weights and set it to zero: the model computes what it did."""
        with torch.no_grad():
            for layer in self.layers.values():
                layer.get_base_layer().weight += layer.get_delta_weight("default")
                layer.lora_B["default"].weight.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under the adapters."""
        return {name: layer.get_base_layer().weight.detach() for name, layer in self.layers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put the weights back."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.get_base_layer().weight.copy_(state[name])


def _adapter(layer: Any) -> Iterator[nn.Parameter]:
    yield layer.lora_A["default"].weight
    yield layer.lora_B["default"].weight


class Average:
    """An exponential moving average of the trained weights: e ← decay e + (1 - decay) w after every step, from their
    start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = trained(model)
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def after(self, step: int) -> None:
        """Take the step's weights in."""
        torch._foreach_lerp_(
            list(self.averages.values()), [weight.detach() for weight in self.weights.values()], 1 - self.decay
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which the model holds the averages."""
        kept = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.finish()
        try:
            yield
        finally:
            put(self.weights, kept)

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


class Looks:
    """The held-out loss while training, on the weights that would be written now; early stopping, and the best weights
    kept."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        optimizer: Any,
        every: int,
        total: int,
        look: Callable[[], float],
        average: Average | None,
        tell: Callable[[int, float], None],
    ) -> None:
        self.weights, self.optimizer, self.look, self.average, self.tell = (
            trained(model),
            optimizer,
            look,
            average,
            tell,
        )
        self.every, self.total, self.patience, self.keeps = every, total, config.patience, config.keep == "best"
        self.found: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}
        self.stop = False

    def after(self, step: int) -> None:
        """Look, if it is time."""
        if step % self.every and step < self.total:
            return
        with optimizers.judging(self.optimizer):
            if self.average is not None:
                with self.average.in_place():
                    self._look(step)
            else:
                self._look(step)

    def _look(self, step: int) -> None:
        loss = self.look()
        self.tell(step, loss)
        better = not self.found or loss < min(loss for _, loss in self.found)
        self.found.append((step, loss))
        if better and self.keeps:
            self.best = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights.items()}
        self.stop = self.patience is not None and len(self.found) - 1 - self._best() >= self.patience

    def _best(self) -> int:
        """Place of the best look, the first of equals."""
        return min(range(len(self.found)), key=lambda place: self.found[place][1])

    def finish(self) -> None:
        """Put the best weights into the model, if they are to be kept."""
        if self.best:
            put(self.weights, self.best)

    @property
    def record(self) -> dict[str, Any]:
        """Every look, and which step's weights are written."""
        if not self.found:
            return {"looks": []}
        best = self.found[self._best()]
        return {
            "looks": [{"step": step, "loss": loss} for step, loss in self.found],
            "best_step": best[0],
            "written_step": best[0] if self.keeps else self.found[-1][0],
            "stopped_early": self.stop,
        }

    def state_dict(self) -> dict[str, Any]:
        """Looks and best weights."""
        return {"found": self.found, "best": self.best, "stop": self.stop}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on looking."""
        self.found = [(step, loss) for step, loss in state["found"]]
        self.best, self.stop = dict(state["best"]), state["stop"]


def put(weights: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Write values into weights of the same names."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])


def heldout_look(
    model: nn.Module,
    batch: Callable[[int], tuple[Any, int]],
    numbers: range,
    loss: LossSums,
    arithmetic: Callable[[], Any],
    over_ranks: Callable[[Tensor], Tensor],
) -> Callable[[], float]:
    """A function that measures the mean loss over prepared batches, each with the number of what its losses are counted
    by (trained tokens, or pairs), in a block of some arithmetic. `numbers` are this rank's; `over_ranks` adds up, so
    that all ranks find the same."""

    def look() -> float:
        training, total, counted = model.training, 0.0, 0
        model.eval()
        try:
            with torch.no_grad(), arithmetic():
                for number in numbers:
                    prepared, more = batch(number)
                    total, counted = total + float(loss(prepared)["loss"]), counted + more
        finally:
            model.train(training)
        sums = over_ranks(torch.tensor([total, counted], dtype=torch.float64, device=next(model.parameters()).device))
        return float(sums[0] / sums[1])

    return look
