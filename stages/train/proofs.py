"""What is proved of the loaded model before it trains: that packing changes nothing, and that fp8 changes little."""

from collections.abc import Mapping, Sequence
from typing import Any

from packing.collate import Bin, collate
from packing.isolation import check_isolation
from stages import quantization
from stages.errors import UserError
from stages.objectives import LossSums, Objective
from stages.train import TrainConfig, float8, model, speed
from stages.train.data import to_device


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


def prove_float8(
    trained: Any, config: TrainConfig, objective: Objective, loss: LossSums, tried: Sequence[Bin], device: str
) -> float:
    """The relative change of the loss on some of the data. Raises UserError for one that is too large."""
    batches = [objective.prepare(collate([each], speed.PADDING)) for each in tried]

    def measured() -> float:
        with speed.autocast(trained, config, device):
            return sum(float(loss(to_device(batch, device))["loss"]) for batch in batches)

    change = float8.loss_change(trained, measured)
    if not abs(change) <= float8.LARGEST_CHANGE:
        raise UserError(
            f"train.precision: in fp8 the model's loss on its own data changes by {100 * change:+.2f} % "
            f"({100 * float8.LARGEST_CHANGE:g} % is allowed): small models lose more by it than they gain; set bf16"
        )
    return round(change, 5)
