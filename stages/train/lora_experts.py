"""The experts of a mixture with LoRA adapters, all in grouped matrix products: y = x W' + scale (x A') B', each token
by its own expert's W, A and B.

PEFT adds scale B A to the weights of all experts and multiplies by the sum: a second copy of every expert, kept for the
backward pass, whose gradient is as large again. Here no matrix of a weight's size is made. The experts' forward pass is
one of transformers' `ExpertsInterface`, after its `grouped_mm` (tokens sorted by expert, one product for all).

    quicken(model)      # every mixture whose experts PEFT adapted and this computes exactly
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["quicken"]

NAME = "regrow"
ALIGNED = 8
"""Numbers of 16 bits in the 16 bytes that rows of a grouped product on a GPU are multiples of."""


class FastExperts(ParamWrapper):  # type: ignore[misc]
    """An adapter of one weight of all experts that leaves the weight alone: the experts ask for its factors."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        yield

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A' [experts, in, rank] and scale B' [experts, rank, out]; None while the adapter is off or in the weight."""
        if self.disable_adapters or self.merged:
            return None
        (name,) = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        a = a.view(self.num_experts, -1, a.shape[1]).transpose(1, 2)
        b = b.view(b.shape[0], -1, self.num_experts).permute(2, 1, 0) * self.scaling[name]
        return a.to(dtype), b.to(dtype).contiguous()


def quicken(model: nn.Module) -> int:
    """Have every mixture compute so whose adapters are plain ones beside weights that transformers multiplies by
    `grouped_mm`. Returns how many."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, forward)
    found = 0
    for experts, wrappers in _adapted(model).items():
        if _fits(experts, wrappers):
            for wrapper in wrappers:
                wrapper.__class__ = FastExperts
            experts.adapters = _Beside({wrapper.parameter_name: wrapper for wrapper in wrappers})
            experts.config._experts_implementation = NAME
            found += 1
    return found


def forward(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """[tokens, width] of [tokens, width]: the experts `chosen` [tokens, k], their results weighted [tokens, k]."""
    if not hasattr(self, "adapters"):
        from transformers.integrations.moe import ExpertsInterface

        plain: Tensor = ExpertsInterface()["grouped_mm"](self, hidden, chosen, weights)
        return plain
    expert, order = torch.sort(chosen.reshape(-1))
    counts = torch.histc(
        expert.float() if hidden.device.type == "cpu" else expert.int(), self.num_experts, 0, self.num_experts - 1
    )
    ends = counts.cumsum(0, dtype=torch.int32)
    rows = hidden[order // chosen.shape[1]]
    if self.has_gate:
        inner = self._apply_gate(_linear(self, "gate_up_proj", rows, ends, expert))
    else:
        inner = self.act_fn(_linear(self, "up_proj", rows, ends, expert))
    out = _linear(self, "down_proj", inner, ends, expert) * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return out[back].view(*chosen.shape, -1).sum(1).to(hidden.dtype)


def _linear(experts: Any, name: str, rows: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
    """[rows, out] The rows, sorted by expert, times their experts' weights, with adapter and bias."""
    weight = getattr(experts, name)
    rows = rows.to(weight.dtype)  # autocast does not know grouped products
    out = F.grouped_mm(rows, weight if experts.is_transposed else weight.transpose(1, 2), offs=ends)
    wrapper = experts.adapters.of.get(name)
    if wrapper is not None and (found := wrapper.factors(weight.dtype)) is not None:
        out = out + F.grouped_mm(F.grouped_mm(rows, found[0], offs=ends), found[1], offs=ends)
    return out + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else out


class _Beside:
    """The adapters of an experts module, by the weight's name; held apart, because they contain the module."""

    def __init__(self, of: dict[str, FastExperts]) -> None:
        self.of = of


def _adapted(model: nn.Module) -> dict[Any, list[Any]]:
    """The experts modules with their adapters, which PEFT wraps around one another."""
    found: dict[Any, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper) and module.num_experts > 1:
            found.setdefault(module.get_base_layer(), []).append(module)
    return found


def _fits(experts: Any, wrappers: list[Any]) -> bool:
    config = getattr(experts, "config", None)
    known = getattr(config, "_experts_implementation", None) in ("grouped_mm", NAME)
    names = {"gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj"}
    return (
        known
        and hasattr(F, "grouped_mm")
        and not getattr(experts, "has_post_expert_norm", False)
        and not getattr(experts, "_is_expert_parallel", False)
        and all(_is_plain(wrapper, names) for wrapper in wrappers)
    )


def _is_plain(wrapper: Any, names: set[str]) -> bool:
    active, weight = wrapper.active_adapters, wrapper.get_param()
    return (
        len(active) == 1
        and wrapper.parameter_name in names
        and weight.is_floating_point()
        and weight.element_size() > 1
        and (not weight.is_cuda or wrapper.r[active[0]] % ALIGNED == 0)
        and not wrapper.merged
    )
