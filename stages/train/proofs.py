"""What is proved of the loaded model before it trains: that packing changes nothing, and that fp8 changes little."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from packing.collate import Bin, collate
from packing.isolation import check_isolation
from stages import quantization
from stages.errors import UserError
from stages.objectives import LossSums, Objective
from stages.train import TrainConfig, float8, model, recomputing, speed
from stages.train.data import to_device
from stages.train.ranks import Group

AT_ONCE = 8192
"""Tokens of a batch whose loss is compared."""


def prove_isolation(trained: Any, config: TrainConfig, device: str) -> Mapping[str, float]:
    """Packed and unpacked documents compared: on a GPU as they train, because the attention kernel is another in
    float32; on a CPU, where it is not, in float32, which shows differences that bfloat16's own noise would hide.
    """
    try:
        with quantization.exact(trained):
            if device == "cpu":
                with model.in_float32(trained):
                    return check_isolation(trained)
            with speed.autocast(trained, config, device):
                return check_isolation(trained)
    except ValueError as error:
        raise UserError(f"train: {error}") from error


@torch.no_grad()
def choose_float8(
    trained: Any,
    config: TrainConfig,
    objective: Objective,
    loss: LossSums,
    tried: Sequence[Bin],
    device: str,
    group: Group,
) -> dict[str, Any]:
    """Have as many linear layers compute in 8 bits as leave the loss on some of the data nearly what it is, on every
    rank the same. Returns which, how many of how many and the relative change, for the record. Raises UserError when
    even the fewest change it too much."""
    size = max(1, AT_ONCE // max(len(packed.ids) for packed in tried))
    batches = [
        objective.prepare(collate(tried[at : at + size], speed.PADDING)) for at in range(0, len(tried), size)
    ]  # fmt: skip
    choices = list(float8.choices(recomputing.layers(trained)).items())
    if not choices:
        raise UserError("train.precision: no linear layer of this model can compute in 8 bits: set bf16")
    able = choices[0][1]

    def measured(chosen: Sequence[Any]) -> float:
        float8.only(able, chosen)
        with speed.autocast(trained, config, device):
            return sum(float(loss(to_device(batch, device))["loss"]) for batch in batches)

    before, changes = measured([]), []
    for _, chosen in choices:
        changes.append(measured(chosen) / before - 1)
        if abs(changes[-1]) <= float8.LARGEST_CHANGE:
            break
    last = group.agree(len(changes) - 1)
    name, chosen = choices[last]
    float8.only(able, chosen)
    if not abs(changes[-1]) <= float8.LARGEST_CHANGE:
        raise UserError(
            f"train.precision: in fp8 the model's loss on its own data changes by {100 * changes[0]:+.2f} %, and by "
            f"{100 * changes[-1]:+.2f} % with the fewest layers ({name}); {100 * float8.LARGEST_CHANGE:g} % is "
            "allowed: set bf16"
        )
    change = round(changes[min(last, len(changes) - 1)], 5)
    if group.rank == 0:
        print(f"fp8: {len(chosen)} of {len(able)} linear layers ({name}), loss {100 * change:+.2f} %")  # noqa: T201
    return {
        "float8_layers": len(chosen),
        "float8_layers_able": len(able),
        "float8_choice": name,
        "float8_loss_change": change,
    }
