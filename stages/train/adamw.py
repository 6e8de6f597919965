"""AdamW over bfloat16 weights that remember what bfloat16 cannot hold.

A float32 weight is split into the bfloat16 number next to it, which the model computes with, and the remainder of its
bits as an int16: together they are the float32 weight, bit for bit. So nothing is cast in a step, and nothing is lost:
AdamW on bfloat16 weights alone drops every update smaller than about 1/256 of a weight.

    split(model)                          # float32 and bfloat16 trained weights → 16 + 16 bits
    optimizer = SplitAdamW(parameters, lr=2e-4)
    whole(parameter)                      # the float32 weight
    put(parameter, value)                 # split again

On a GPU a step is one kernel over all weights, with the gradient's clipping in it (`factor`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MOST_NARROW",
    "SplitAdamW",
    "add_up_wide",
    "clipping",
    "held_wide",
    "is_split",
    "put",
    "split",
    "whole",
    "whole_on_cpu",
    "widen",
]

SPREAD = 0x9E3779B9
"""Of a step's number, so that neighbouring steps draw different random bits."""
MOST_NARROW = 16
"""Passes of one step whose gradients are added up in 16 bits, as each of them is. The sum of so many is off by 0.4 %;
of 64 by 0.8 %, of 1,024 by a fifth, for what is added last is lost in what is there (a small random Llama)."""
TABLES = 16
"""Tables of addresses kept: one for each set of weights that was updated together."""
PIECE = 2**24
"""Numbers of a weight that are put together at once for a copy, so that a full GPU has room for them."""


def split(model: nn.Module, wide: Iterable[str] = ()) -> None:
    """Hold every trained weight of `model` as bfloat16 with a remainder, `parameter.low_bits`, and frozen float32 ones
    too, as all are multiplied with bfloat16. Those whose name has one of `wide` in it stay as they are (what
    transformers keeps in float32 for a model's sake)."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in wide):
            continue
        if parameter.dtype == torch.float32:
            parameter.data, remainder = _apart(parameter.data)
        elif parameter.dtype == torch.bfloat16 and parameter.requires_grad:
            remainder = torch.zeros_like(parameter, dtype=torch.int16)
        else:
            continue
        parameter.low_bits = remainder  # type: ignore[attr-defined]


def held_wide(model: Any) -> list[str]:
    """Parts of names of the weights that transformers holds in float32 for a model's sake."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return [name for each in kept for name in getattr(base, each, None) or ()]


def is_split(model: nn.Module) -> bool:
    """Whether any weight is split."""
    return any(hasattr(parameter, "low_bits") for parameter in model.parameters())


def add_up_wide(model: nn.Module) -> int:
    """Have the gradients of split weights added up in float32, each of them still in 16 bits. Returns how many."""
    trained = [p for p in model.parameters() if p.requires_grad and hasattr(p, "low_bits")]
    for parameter in trained:
        parameter.grad_dtype = torch.float32
    return len(trained)


def whole(parameter: Tensor) -> Tensor:
    """A trained weight in full precision."""
    remainder = getattr(parameter, "low_bits", None)
    return parameter.detach() if remainder is None else _together(parameter.detach(), remainder)


def whole_on_cpu(parameter: Tensor) -> Tensor:
    """A copy of a trained weight in full precision, in the CPU's memory."""
    remainder = getattr(parameter, "low_bits", None)
    if remainder is None:
        return parameter.detach().to("cpu", copy=True)
    copied = torch.empty(parameter.shape, dtype=torch.float32)
    flat = (copied.view(-1), parameter.detach().reshape(-1), remainder.reshape(-1))
    for piece, high, low in zip(*(torch.split(each, PIECE) for each in flat), strict=True):
        piece.copy_(_together(high, low))
    return copied


def put(parameter: Tensor, value: Tensor) -> None:
    """Write a value into a trained weight, split as that is."""
    with torch.no_grad():
        if hasattr(parameter, "low_bits"):
            value, remainder = _apart(value.float())
            parameter.low_bits.copy_(remainder)
        parameter.copy_(value)


def widen(model: nn.Module, device: str | None = "cpu") -> None:
    """Hold every split weight in float32 again: on the CPU, for writing it after the last step, or on `device`; None is
    where it is."""
    for parameter in model.parameters():
        if hasattr(parameter, "low_bits"):
            parameter.grad = None
            parameter.data = whole(parameter).to(device=device)
            del parameter.low_bits


def clipping(weights: Iterable[nn.Parameter], longest: float) -> tuple[Tensor, Tensor | None]:
    """The Euclidean norm of all gradients, float32, and what they are to be multiplied by, so that it is `longest` at
    most; None where there are none."""
    weights = list(weights)
    gradients = [p.grad for p in weights if p.grad is not None]
    if not gradients:  # of a step that was left out
        return torch.zeros((), device=weights[0].device), None
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    norm: Any = torch.linalg.vector_norm(torch.stack(norms))
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norm, (longest / (norm + 1e-6)).clamp(max=1.0)


def _apart(value: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 (half away from zero) and what is to be added to its bits for the float32."""
    bits = value.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def _together(high: Tensor, remainder: Tensor) -> Tensor:
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


class SplitAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101): decoupled weight decay, bias-corrected averages, as `torch.optim.AdamW`.

    Weights are split ones or float32, maybe sharded: each rank then updates its part. The averages are float32, or
    bfloat16 (`moments`), rounded up or down at random so that small changes add up in the mean; the random bits follow
    from the step's number.
    """

    factor: Tensor | None = None
    """What the next step's gradients are multiplied by (a float32 number on the weights' device): their clipping."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: str = "float32",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments: torch.dtype = getattr(torch, moments)
        self._tables: dict[tuple[int, ...], Any] = {}

    def clip(self, longest: float) -> Tensor:
        """The Euclidean norm of all gradients, float32; the next step scales them down to `longest` if it is more."""
        norm, self.factor = clipping((p for group in self.param_groups for p in group["params"]), longest)
        return norm

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        with torch.no_grad():
            for number, group in enumerate(self.param_groups):
                by_step: dict[int, list[nn.Parameter]] = {}
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        by_step.setdefault(self._count(parameter), []).append(parameter)
                for count, parameters in by_step.items():
                    self._update(number, group, parameters, count)
        self.factor = None

    def _count(self, parameter: nn.Parameter) -> int:
        """The number of this step for a weight, from 1."""
        state = self.state[parameter]
        if not state:
            # Its tables hold the addresses of averages: of a weight that was forgotten, they are no longer its own.
            self._tables.clear()
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments)
            if hasattr(parameter, "low_bits"):
                state["low_bits"] = parameter.low_bits
        state["step"] += 1
        return int(state["step"])

    def _update(self, number: int, group: Mapping[str, Any], parameters: list[nn.Parameter], count: int) -> None:
        beta1, beta2 = group["betas"]
        rates = {
            "learning_rate": float(group["lr"]),
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": group["eps"],
            "decay": group["weight_decay"],
            "step": count,
            "seed": count * SPREAD % 2**31,
        }
        mine = [p for p in parameters if _here(p).numel()]  # of a short weight some ranks have nothing
        weights, gradients = [_here(p) for p in mine], [_here(p.grad) for p in mine]
        if weights and weights[0].is_cuda:
            from stages.kernels.adamw import Weights

            addresses = (number, *(weight.data_ptr() for weight in weights))
            if addresses not in self._tables:
                while len(self._tables) >= TABLES:
                    del self._tables[next(iter(self._tables))]
                states = [self._state_here(p) for p in mine]
                self._tables[addresses] = Weights(list(zip(weights, states, strict=True)))
            self._tables[addresses].update_(gradients, self.factor, **rates)
            return
        for parameter, weight, gradient in zip(mine, weights, gradients, strict=True):
            update_(weight, gradient, self._state_here(parameter), self.factor, **rates)

    def _state_here(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {name: _here(value) for name, value in self.state[parameter].items()}

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer, without the remainders, which belong to the weights."""
        described: dict[str, Any] = super().state_dict()
        described["state"] = {
            number: {name: value for name, value in state.items() if name != "low_bits"}
            for number, state in described["state"].items()
        }
        return described

    def load_state_dict(self, state_dict: Any) -> None:
        """As any optimizer, but every tensor keeps its own dtype, and remainders are those that the weights have. State
        that another AdamW wrote will do."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number, {})
            for name, value in saved.items():
                kept = value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                self.state[parameter][name] = kept
            if not saved:
                continue
            self.state[parameter]["step"] = int(saved["step"])  # torch's own counts in a tensor
            if hasattr(parameter, "low_bits"):
                if "low_bits" in saved:  # checkpoints had them here once, and beside them weights of 16 bits
                    parameter.low_bits.copy_(saved["low_bits"])
                self.state[parameter]["low_bits"] = parameter.low_bits
        self._tables.clear()


def _here(value: Any) -> Any:
    """This rank's part of a tensor that is cut over ranks, in the same memory; anything else as it is."""
    return value.to_local() if hasattr(value, "to_local") else value


def update_(
    parameter: Tensor,
    gradient: Tensor,
    state: Mapping[str, Any],
    factor: Tensor | None,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    step: int,
    seed: int,
) -> None:
    """One weight's step in torch, all written in place: the CPU's path, and what the kernel must equal."""
    weight, first, second = whole_of(parameter, state), state["exp_avg"].float(), state["exp_avg_sq"].float()
    gradient = gradient.float() if factor is None else gradient.float() * factor
    first = first + (1 - beta1) * (gradient - first)
    second = beta2 * second + (1 - beta2) * gradient * gradient
    weight = weight * (1 - learning_rate * decay)
    weight -= learning_rate / (1 - beta1**step) * first / ((second / (1 - beta2**step)).sqrt() + epsilon)
    if "low_bits" in state:
        high, remainder = _apart(weight)
        parameter.copy_(high)
        state["low_bits"].copy_(remainder)
    else:
        parameter.copy_(weight)
    for average, value in ((state["exp_avg"], first), (state["exp_avg_sq"], second)):
        average.copy_(_shaken(value, seed) if average.dtype == torch.bfloat16 else value)


def whole_of(parameter: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The float32 weight from an optimizer's state."""
    return _together(parameter, state["low_bits"]) if "low_bits" in state else parameter


def _shaken(value: Tensor, seed: int) -> Tensor:
    """To bfloat16, up or down at random, with the probability that makes the mean exact."""
    random = torch.Generator(value.device).manual_seed(seed)
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0x10000, bits.shape, generator=random, dtype=torch.int32, device=value.device)
    return ((bits + noise) >> 16).to(torch.int16).view(torch.bfloat16)
