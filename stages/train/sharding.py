"""A model cut over ranks: each holds a part of every weight, gradient and optimizer state (PyTorch's `fully_shard`,
the second generation of FSDP; after ZeRO, arXiv:1910.02054). Whole layers exist only while they compute."""

from typing import Any

import torch
from torch import nn

from stages.objectives import Batch, LossSums, Sums
from stages.train import adamw


class Loss(nn.Module):
    """A model and its loss as one module, so that what the loss uses outside the model's own forward is there too."""

    def __init__(self, model: nn.Module, loss: LossSums, ranks: int) -> None:
        super().__init__()
        self.model, self.loss, self.ranks = model, loss, ranks

    def forward(self, batch: Batch) -> Sums:
        """The objective's sums, the loss times the ranks: `fully_shard` and DeepSpeed take the mean of gradients."""
        sums = self.loss(batch)
        return {**sums, "loss": sums["loss"] * self.ranks}


def shard(model: Any, loss: LossSums, ranks: int, device: str, narrow: torch.dtype | None = None) -> LossSums:
    """Cut `model` in place over all ranks, layer by layer, and return the loss to call from now on.

    The model may still be on the CPU: each rank's part goes to its device. Whole layers are gathered, and compute, in
    `narrow` where it is given; what a rank keeps of a weight, and gradients added up over ranks, do not change dtype.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    given: dict[str, Any] = {"mesh": init_device_mesh(device, (ranks,))}
    if narrow is not None:
        # Batches hold numbers that are no activations (rewards, a reference's losses): they are not to be rounded.
        given["mp_policy"] = MixedPrecisionPolicy(narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = Loss(model, loss, ranks)
    for part in (*sharded_layers(model), whole):
        adamw.widen(part, None)  # what a rank keeps needs no halves
        fully_shard(part, **given)
    return whole


def sharded_layers(model: Any) -> list[nn.Module]:
    """The modules that are gathered one after another; what is outside of them is there all the time."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = set(base._no_split_modules or ())
    return [module for module in model.modules() if kinds.intersection(kind.__name__ for kind in type(module).__mro__)]


def gathered_dtype(model: Any, precision: str) -> torch.dtype | None:
    """What whole layers are gathered in: bfloat16 where training computes in that, unless transformers holds some of
    the model's weights in float32 for its sake. None is as they are held, cast by autocast: each cast is kept for the
    backward pass, so that a rank ends up holding every layer in 16 bits.

    What is gathered in 16 bits is checked in them, too, as halves of float32 weights (`stages.train.adamw`)."""
    return torch.bfloat16 if precision == "bf16" and not adamw.held_wide(model) else None


def gathered_bytes(model: Any) -> int:
    """What is whole at a time when layers are gathered in 16 bits: what lies outside of them, the layer that computes
    and the one that comes next; the gradients of the first two, in 16 bits and for their sum over ranks in 32."""
    layers = sharded_layers(model)
    within = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in within]
    largest = max(([*layer.parameters()] for layer in layers), key=_numbers, default=[])
    learn = [parameter for parameter in (*outside, *largest) if parameter.requires_grad]
    return 2 * (_numbers(outside) + 2 * _numbers(largest)) + 6 * _numbers(learn)


def _numbers(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
