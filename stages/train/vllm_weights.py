"""A model's weights as vLLM is told them: by the names they had before there was an adapter, with the adapter in them.

TRL adds the adapter to the weights in place, hands those out, and takes it off again. Two things go wrong so, and
neither is told. A server's weights are packed a gigabyte at a time, once the last one of it was handed out, and with
the very last one the adapter is off again: what is sent are the weights from before training. And in bfloat16 what was
added and taken off leaves other weights behind, under an adapter that will be used with those from before.

So every adapted weight is made apart from the model, which stays as it is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

WRAPPED, SAVED = ".base_layer", ".modules_to_save.default"
"""What PEFT puts into the names of weights: of an adapted layer, and of one that trains in full beside the adapter."""


class Told(nn.Module):
    """What stands for the model in `trl.generation.vllm_generation.VLLMGeneration`, which reads its weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def named_parameters(self, *_args: Any, **_given: Any) -> Iterator[tuple[str, Any]]:
        """Every weight by its name in the model before training; some are tensors, not parameters."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # they are read on another stream than the one that the last step runs on
        adapter = getattr(self.model, "prefix", None)  # what the names of an adapter's own weights begin with
        for name, weight in self.model.named_parameters():
            layer, _, kind = name.rpartition(".")
            if adapter and (f".{adapter}" in name or ".original_module." in name):
                continue
            if ".modules_to_save." in name and f"{SAVED}." not in name:  # of another adapter, which rests
                continue
            plain = name.removeprefix("base_model.model.").replace(WRAPPED, "").replace(SAVED, "")
            if layer.endswith(WRAPPED) and kind == "weight":
                yield plain, merged(self.model.get_submodule(layer.removesuffix(WRAPPED)))
            else:
                yield plain, weight.detach()


@torch.no_grad()
def merged(layer: nn.Module) -> Tensor:
    """An adapted layer's weight with its adapter in it: a tensor of its own, by PEFT's arithmetic. The layer's stays as
    it is."""
    assert isinstance(layer, BaseTunerLayer)
    base: Any = layer.get_base_layer()
    before = base.weight.data
    layer.merge(safe_merge=True)  # puts a new tensor in the weight's place
    try:
        return base.weight.data  # type: ignore[no-any-return]
    finally:
        base.weight.data = before
        layer.merged_adapters.clear()
