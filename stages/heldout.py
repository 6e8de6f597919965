"""Held-out loss: the trained objective's loss over the plan's held-out rows, a packed sequence at a time.

The sequences and the loss are those of training, so that the two curves may be laid side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stages.generation import Precision, load
from stages.runtime import Runtime
from stages.tables import read_table


@dataclass(frozen=True)
class HeldoutLoss:
    """Loss in nats, summed over the trained tokens of each held-out sequence."""

    sums: list[float]
    """[sequences]"""
    tokens: list[int]
    """[sequences] Trained tokens."""


def heldout_loss(
    weights: Path,
    tokens: Path,
    plan: Path,
    precision: Precision,
    runtime: Runtime,
    measured: Callable[[int, int], None],
) -> HeldoutLoss:
    """The loss of a model's folder over the held-out sequences; empty when the plan holds none out.

    `measured` hears how many sequences are done, and of how many.
    """
    if len(read_table(plan / "heldout_bins.arrow")) == 0:
        return HeldoutLoss([], [])
    import torch

    from packing.collate import PackedBins, collate
    from stages import objectives

    bins = PackedBins(tokens, plan, heldout=True)
    if bins.kind != "conversation":  # whose texts are not all meant to be learned
        return HeldoutLoss([], [])
    objective = objectives.find("sft")
    network = load(weights, precision, runtime.device, packed=True).network
    sums: list[float] = []
    of_batch: objectives.LossSums | None = None
    with torch.inference_mode():
        for number in range(len(bins)):
            ready = objective.prepare(collate([bins[number]]))
            batch = {n: v.to(network.device) if isinstance(v, torch.Tensor) else v for n, v in ready.items()}
            of_batch = of_batch or objective.loss(network, objective.options(), batch)
            sums.append(float(of_batch(batch)["loss"]))
            measured(number + 1, len(bins))
    return HeldoutLoss(sums, [int(n) for n in bins.trained])
