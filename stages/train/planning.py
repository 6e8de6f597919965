"""The memory plan of one attempt: `stages.train.memory` asked about the loaded model, this device and this batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from packing.collate import Bin, PackedBins
from stages.errors import UserError
from stages.last_layer import KEPT
from stages.objectives import LossSums, Objective
from stages.train import TrainConfig, memory, recomputing, speed
from stages.train.data import to_device
from stages.train.ranks import Group
from stages.train.recomputing import MODES, Mode
from stages.train.samples import two_documents

WHOLE = 0.5
"""The share of a device's memory that a model may take to be checked there before it is sharded."""


def place_to_check(folder: Path, config: TrainConfig, device: str, sharded: bool) -> str:
    """Where the model is loaded and checked: the device that trains it, unless the model is to be sharded over several
    because it is too large for one. Then that is the CPU, which takes minutes where a GPU takes seconds."""
    if not sharded or device == "cpu":
        return device
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError):  # loading it says what is wrong
        return device
    each = 2 if config.method == "lora" and config.precision != "fp32" else 4
    return device if each * sum(p.numel() for p in empty.parameters()) < WHOLE * memory.room(device) else "cpu"


def refuse_too_big(trained: Any, device: str) -> None:
    """Raise UserError for weights that do not even fit where they are to be trained."""
    size, room = sum(p.numel() * p.element_size() for p in trained.parameters()), memory.room(device)
    if device == "cuda" and size > room:
        raise UserError(
            f"the model's weights take {size / 1e9:.1f} GB, and the device has {room / 1e9:.1f} GB free: train a "
            "smaller model, or several ranks with the runtime's shard: fsdp"
        )


def plan_memory(
    config: TrainConfig,
    trained: Any,
    bins: PackedBins,
    example: Bin,
    objective: Objective,
    loss: LossSums,
    group: Group,
    device: str,
    shard: str,
    micro_batch: int | Literal["auto"],
    recompute: Mode | Literal["auto"],
) -> memory.Plan:
    """The memory plan, rank 0's on every rank. Raises UserError when nothing fits."""
    place = next(trained.parameters()).device.type

    def forward(tokens: int, count: int | None = None) -> torch.Tensor:
        batch = objective.prepare(two_documents(example, tokens, count))
        batch.pop(KEPT, None)  # or the last layer would be counted as if few tokens trained
        with speed.autocast(trained, config, place):
            return loss(to_device(batch, place))["loss"]

    how = (config.optimizer, config.precision, group.size, shard, bins.longest, config.ema is not None)
    costs = memory.measure(trained, forward, *how)
    room, length = memory.room(device), bins.sequence_length
    frozen = sum(p.numel() for p in trained.parameters()) * (4 if config.precision == "fp32" else 2)
    if recompute != "auto" and recompute not in costs.token:
        raise UserError(
            f"{trained.config.model_type} has no layers that transformers can compute anew: set the runtime's "
            "activation_checkpointing to none"
        )

    def choose(costs: memory.Costs) -> memory.Plan:
        return memory.choose(
            costs,
            room,
            length,
            -(-bins.global_batch // group.size),
            micro_batch,
            recompute,
            device,
            lambda: memory.nearest(costs, room, length, config.method, frozen, group.size, shard, device),
        )

    plan = choose(costs)
    if plan.activation_checkpointing == "selective" and not recomputing.works(trained, "selective", forward):
        if recompute == "selective":
            raise UserError(
                f"{trained.config.model_type} changes results in place that selective checkpointing keeps: set the "
                "runtime's activation_checkpointing to full, or leave it at auto"
            )
        plan = choose(replace(costs, token={m: cost for m, cost in costs.token.items() if m != "selective"}))
    agreed = group.agree(plan.micro_batch), MODES[group.agree(MODES.index(plan.activation_checkpointing))]
    wide = bool(group.agree(int(plan.wide_sums)))
    plan = replace(plan, micro_batch=agreed[0], activation_checkpointing=agreed[1], wide_sums=wide)
    if group.rank == 0:
        print(plan, flush=True)  # noqa: T201  (a stage's prints are its log)
    return plan
