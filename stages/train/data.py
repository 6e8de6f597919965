"""Optimizer steps as the trainer reads them: each a list of micro-batches and what their losses are divided by.

The plan's bins stand in step order. The first epoch takes its steps as they stand, every later one in a seeded
permutation of whole steps; so a step number alone says which bins it reads, and resuming seeks there. The same number
seeds what a micro-batch draws (dropout, noise): a position is all the random state there is, on any number of ranks.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from packing.collate import PackedBins, collate
from packing.plan import deal
from stages import objectives
from stages.errors import UserError
from stages.objectives import Batch, Objective
from stages.tables import read_table
from stages.train.windows import Windows


class MicroBatch(TypedDict):
    """One forward and backward pass."""

    batch: dict[str, Any]
    """Prepared by the objective."""
    seed: int
    """Of what the pass draws."""
    counts: bool
    """False for a pass that only keeps this rank in step with the others: its loss is multiplied by zero."""


class Step(TypedDict):
    """What one rank computes of one optimizer step."""

    batches: list[MicroBatch]
    """As many on every rank; none when the step is left out."""
    count: int
    """What the step's losses on all ranks are divided by: the trained tokens in it, the documents or the pairs."""


def step_order(windows: Sequence[int], global_batch: int, total: int, seed: int) -> list[int]:
    """The plan's step that each of `total` training steps takes: one after the other, then permutations of them.

    `windows` are the plan's. They stay in their order and steps in their window; one that reads two stays between them.
    """
    begins = np.arange(0, windows[-1], global_batch)
    window = np.searchsorted(windows, begins, side="right")
    ends = np.minimum(begins + global_batch, windows[-1]) - 1
    within = window == np.searchsorted(windows, ends, side="right")
    epochs = [np.arange(len(begins))]
    for epoch in range(1, -(-total // len(begins))):
        random, order = np.random.default_rng((seed, epoch)), np.arange(len(begins))
        for number in np.unique(window):
            own = np.flatnonzero(within & (window == number))
            order[own] = own[random.permutation(len(own))]
        epochs.append(order)
    return [int(step) for step in np.concatenate(epochs)[:total]]


def open_bins(inputs: Mapping[str, Path], objective: str = "sft") -> PackedBins:
    """The plan's training bins. Raises UserError for rows that an objective does not train on, and when there is
    nothing to train on."""
    bins = PackedBins(inputs["tokens"], inputs["plan"], inputs.get("reference"))
    objectives.refuse_other_kinds(objective, bins.kind, "the plan")
    if not len(bins) or not bins.trained.sum():
        raise UserError("the plan holds nothing to train on: see the data report of pack for what was dropped and why")
    return bins


def to_device(batch: Batch, device: "str | torch.device") -> dict[str, Any]:
    """A batch with its tensors on a device; from pinned memory without waiting."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        return to_device(value, device) if isinstance(value, dict) else value

    return {name: moved(value) for name, value in batch.items()}


class Steps(Dataset[Step]):
    """The steps of a training run by number, as one of `ranks` computes them. `left_out` are positions that train
    nothing: their batches had upset the training."""

    def __init__(
        self,
        bins: PackedBins,
        order: Sequence[int],
        micro_batch: int,
        objective: Objective,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        left_out: Collection[int] = (),
        pad_to: int = 8,
        windows: Windows | None = None,
    ) -> None:
        """A micro-batch is padded to a multiple of `pad_to` tokens: compiled models want all equally long. `windows`
        have what a step reads on the disk."""
        self.bins, self.order, self.micro_batch, self.objective = bins, order, micro_batch, objective
        self.seed, self.rank, self.ranks, self.left_out = seed, rank, ranks, frozenset(left_out)
        self.pad_to, self.windows = pad_to, windows

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> Step:
        if number in self.left_out:
            return {"batches": [], "count": 0}
        if self.windows:
            self.windows.reach(number)
        step = self.numbers(number)
        hands = deal(len(step), self.ranks)
        mine = [step[i] for i in hands[self.rank]]
        passes = -(-max(map(len, hands)) // self.micro_batch)
        parts = [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]
        idle = parts[-1:] or [list(step[:1])]
        return {
            "batches": [
                *(self._pass(number, part, True) for part in parts),
                *(self._pass(number, idle[0], False) for _ in range(passes - len(parts))),
            ],
            "count": self.count(number),
        }

    def _pass(self, number: int, bins: Sequence[int], counts: bool) -> MicroBatch:
        drawn = np.random.SeedSequence((self.seed, number, *bins)).generate_state(1)
        batch = self.objective.prepare(collate([self.bins[i] for i in bins], self.pad_to))
        return {"batch": batch, "seed": int(drawn[0]), "counts": counts}

    def numbers(self, number: int) -> range:
        """The bins of a training step."""
        return self.bins.step(self.order[number])

    def tokens(self, number: int) -> int:
        """Tokens in a training step, without padding."""
        return int(self.bins.lengths[self.numbers(number)].sum())

    def count(self, number: int) -> int:
        """What the objective counts in a training step."""
        return self.objective.count(self.bins, self.numbers(number))

    def trained(self, number: int) -> int:
        """Trained tokens in a training step."""
        return int(self.bins.trained[self.numbers(number)].sum())


def name_rows(plan: Path, bins: Iterable[int], at_most: int = 20) -> str:
    """The source rows in some bins, for an error message, counted from 1: `chat/00000 rows 3, 17; code/00002 row 5`."""
    lists = read_table(plan / "bins.arrow").column("documents")
    documents = read_table(plan / "documents.arrow").take([d for b in bins for d in lists[b].as_py()])
    pieces = zip(documents["shard"].to_pylist(), documents["number"].to_pylist(), strict=True)
    rows = list(dict.fromkeys(pieces))  # a wrapped document is in several pieces
    shards = json.loads((plan / "plan.json").read_text())["shards"]
    found: dict[str, list[int]] = {}
    for shard, row in rows[:at_most]:
        found.setdefault(shards[shard]["path"], []).append(number_of_row(shards[shard], row))
    parts = []
    for path, numbers in sorted(found.items()):
        parts.append(f"{path} row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)))}")
    more = f" and {len(rows) - at_most} more" if len(rows) > at_most else ""
    return "; ".join(parts) + more


def number_of_row(shard: Mapping[str, Any], row: int) -> int:
    """A row's number in its source, from 1, by the one it has in its shard, from 0. `shard` as in plan.json."""
    return int(shard.get("first", 0)) + row + 1


def refuse_unknown_tokens(shards: Iterable[Mapping[str, Any]], vocabulary: int) -> None:
    """Raise UserError when a token has no embedding in the model. `shards` as in plan.json."""
    for shard in shards:
        if shard["highest_token"] >= vocabulary:
            raise UserError(
                f"{shard['path']}: the tokenizer gives token {shard['highest_token']}, but the model embeds only "
                f"{vocabulary} tokens: tokenizer and weights do not belong together"
            )
