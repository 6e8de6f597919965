"""A model cut over ranks: each holds a part of every weight, gradient and optimizer state (PyTorch's `fully_shard`,
the second generation of FSDP; after ZeRO, arXiv:1910.02054). Whole layers exist only while they compute."""

from typing import Any

from torch import nn

from stages.objectives import Batch, LossSums, Sums


class Loss(nn.Module):
    """A model and its loss as one module, so that what the loss uses outside the model's own forward is there too."""

    def __init__(self, model: nn.Module, loss: LossSums, ranks: int) -> None:
        super().__init__()
        self.model, self.loss, self.ranks = model, loss, ranks

    def forward(self, batch: Batch) -> Sums:
        """The objective's sums, the loss times the ranks: `fully_shard` and DeepSpeed take the mean of gradients."""
        sums = self.loss(batch)
        return {**sums, "loss": sums["loss"] * self.ranks}


def shard(model: Any, loss: LossSums, ranks: int, device: str) -> LossSums:
    """Cut `model` in place over all ranks, layer by layer, and return the loss to call from now on.

    The model may still be on the CPU: each rank's part goes to its device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (ranks,))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = set(base._no_split_modules or ())
    whole = Loss(model, loss, ranks)
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(whole, mesh=mesh)
    return whole
