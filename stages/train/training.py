"""What a trainer needs besides the model: one attempt's circumstances."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stages.objectives import Batch, LossSums
from stages.stage import Work
from stages.train import TrainConfig
from stages.train.data import Steps
from stages.train.ranks import Group, Stopping


@dataclass(frozen=True)
class Training:
    """Of one attempt and rank."""

    config: TrainConfig
    steps: Steps
    loss: LossSums
    shard: str
    """How ranks hold the model (`stages.runtime`); `none` with one."""
    cast: bool
    """Whether autocast casts the weights to a narrower precision."""
    example: Batch
    """A small batch, prepared, on the CPU."""
    baseline: LossSums | None
    """What the losses of a step are compared with; see `stages.objectives.Objective`."""
    work: Work
    device: str
    trackers: tuple[str, ...]
    """By transformers' names."""
    group: Group
    stopping: Stopping
    identity: dict[str, Any]
    """Whose training it is, for the checkpoints."""
    name_rows: Callable[[range], str]
    """Names the source rows in some bins."""
    flops: Callable[[int], float]
    """Floating-point operations of a step."""
    peak: float | None
    """The device's FLOP/s."""
    look: Callable[[], float] | None
    """Measures the held-out loss."""
