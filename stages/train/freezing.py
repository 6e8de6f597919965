"""Which weights train, for the method full: patterns, Spectrum, LISA."""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.errors import UserError
from stages.train import Full, Lisa, optimizers
from stages.train.patterns import matches, nearest


def freeze(model: Any, full: Full) -> None:
    """Leave `requires_grad` to the weights that a recipe trains.

    Raises UserError for a pattern that names no weight, and when no weight is left.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = set(names)
    if full.only:
        chosen = _named(full.only, names, "full.only")
    if full.spectrum is not None:
        chosen = spectrum(model, full.spectrum)
    chosen -= _named(full.freeze, names, "full.freeze")
    if not chosen:
        raise UserError("train.full: no weight is left to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def _named(patterns: Iterable[str], names: list[str], key: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        meant = {name for name in names if matches(pattern, name)}
        if not meant:
            raise UserError(f"train.{key}: no weight is called {pattern!r}{nearest(pattern, names)}")
        found |= meant
    return found


def spectrum(model: Any, share: float) -> set[str]:
    """The matrices of each kind with most signal over noise, and embeddings and head with them (Spectrum,
    arXiv:2406.06623). A kind are the matrices of the same name in all layers; of n, ceil(share n) train."""
    kinds: dict[str, list[tuple[float, str]]] = {}
    outside = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if optimizers.is_matrix(name, parameter) and id(parameter) not in outside:
            kind = re.sub(r"\.\d+\.", ".*.", name)
            kinds.setdefault(kind, []).append((signal_to_noise(parameter.detach()), name))
    chosen = {name for name, parameter in model.named_parameters() if id(parameter) in outside}
    for found in kinds.values():
        best = sorted(found, key=lambda each: -each[0])[: math.ceil(share * len(found))]
        chosen |= {name for _, name in best}
    return chosen


def signal_to_noise(weight: Tensor) -> float:
    """Sum of a matrix's singular values above the largest that noise alone would have, over the sum of the others, over
    the largest value.

    Noise of standard deviation σ has none above σ (1 + √β), with β the smaller side over the larger (Marchenko and
    Pastur); σ is estimated by the quartiles' distance of the singular values over 1.349, as of a normal distribution.
    Of fused experts [experts, ., .] the mean.
    """
    if weight.ndim > 2:
        return float(np.mean([signal_to_noise(each) for each in weight.flatten(0, -3)]))
    values = torch.linalg.svdvals(weight.float())
    quarters = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device))
    sigma = float(quarters[1] - quarters[0]) / 1.349
    small, large = sorted(weight.shape)
    bound = sigma * (1 + math.sqrt(small / large))
    signal, noise = float(values[values > bound].sum()), float(values[values <= bound].sum())
    return signal / noise / float(values.max()) if noise else math.inf


class LayerSampling:
    """LISA (arXiv:2403.17919): of the layers only a few at a time train, drawn anew every so many steps; embeddings,
    head and last norm always do. A layer that rests keeps no optimizer state."""

    def __init__(self, model: Any, lisa: Lisa, seed: int, optimizer: Any) -> None:
        self.layers = _layers(model)
        if lisa.layers > len(self.layers):
            raise UserError(f"train.full.lisa.layers is {lisa.layers}, but the model has {len(self.layers)} layers")
        self.count, self.every, self.seed, self.optimizer = lisa.layers, lisa.every, seed, optimizer

    def drawn(self, step: int) -> set[int]:
        """The layers that train in the step after `step` steps."""
        random = np.random.default_rng((self.seed, step // self.every))
        return set(random.choice(len(self.layers), self.count, replace=False).tolist())

    def before(self, step: int) -> None:
        """Let the others rest, within the step: whoever asks between steps sees all as trained."""
        self._rest(self.drawn(step))

    def after(self, step: int) -> None:
        """End the rest; forget what the optimizer knew of layers that rest now."""
        self._rest(set(range(len(self.layers))))
        if step % self.every == 0:
            kept = self.drawn(step)
            resting = [layer for number, layer in enumerate(self.layers) if number not in kept]
            optimizers.forget(self.optimizer, [p for layer in resting for p in layer.parameters()])

    def _rest(self, awake: set[int]) -> None:
        for number, layer in enumerate(self.layers):
            layer.requires_grad_(number in awake)


def _layers(model: Any) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"train.full.lisa: {model.config.model_type} keeps its layers in no list")
