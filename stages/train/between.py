"""What happens between optimizer steps: restarts, layer sampling, averages, looks at the held-out loss.

    between = make(model, config, optimizer, total, look, tell)
    trainer.add_callback(between)         # runs its parts at every step's ends
    between.state_dict()                  # what a checkpoint must hold of them
    between.finish()                      # after the last step: the model holds the weights that are written

A part has some of: `before(step)` (steps done so far), `after(step)`, `finish()`, `state_dict()` and
`load_state_dict(state)`, `stop` (whether training is to end here).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.train import TrainConfig, optimizers
from stages.train.adapters import STARTS
from stages.train.freezing import LayerSampling
from stages.train.heldout import Looks
from stages.train.schedules import steps_of
from stages.train.weights import Average


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
        start = STARTS.get(config.lora.init, config.lora.init)
        parts["restarts"] = Restarts(model, config.lora.restart_every, total, config.seed, optimizer, start)
    if config.ema is not None:
        parts["ema"] = Average(model, config.ema)
    if look is not None:
        assert config.evaluate_every is not None
        every = steps_of(config.evaluate_every, total)
        parts["heldout"] = Looks(model, config, optimizer, every, total, look, parts.get("ema"), tell)
    return Between(parts)


class Restarts:
    """ReLoRA (arXiv:2307.05695): every so often the adapter is added to the weights and starts anew, with a fresh
    optimizer, so that a sum of low ranks can become a high one."""

    def __init__(
        self, model: nn.Module, every: int, total: int, seed: int, optimizer: Any, start: bool | str = True
    ) -> None:
        """`start` is how adapters start, as PEFT calls it."""
        self.every, self.total, self.seed, self.optimizer, self.start = every, total, seed, optimizer, start
        self.layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}

    def after(self, step: int) -> None:
        """Restart, if it is time."""
        if step % self.every or step >= self.total:
            return
        self.finish()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 1_000_003 + step)
            for layer in self.layers.values():
                layer.reset_lora_parameters("default", self.start)
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
