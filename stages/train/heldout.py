"""The loss of the rows that the plan held out, while training: early stopping, and the best weights kept."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from packing.collate import PackedBins, collate
from stages.errors import UserError
from stages.objectives import LossSums, Objective
from stages.train import TrainConfig, adamw, optimizers, speed
from stages.train.data import to_device
from stages.train.ranks import Group
from stages.train.weights import Average, put, trained


class Looks:
    """The held-out loss while training, on the weights that would be written now; early stopping, and the best weights
    kept."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        optimizer: Any,
        every: int,
        total: int,
        look: Callable[[], float],
        average: Average | None,
        tell: Callable[[int, float], None],
    ) -> None:
        self.weights, self.optimizer, self.look, self.average, self.tell = (
            trained(model),
            optimizer,
            look,
            average,
            tell,
        )
        self.every, self.total, self.patience, self.keeps = every, total, config.patience, config.keep == "best"
        self.found: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}
        self.stop = False

    def after(self, step: int) -> None:
        """Look, if it is time."""
        if step % self.every and step < self.total:
            return
        with optimizers.judging(self.optimizer):
            if self.average is not None:
                with self.average.in_place():
                    self._look(step)
            else:
                self._look(step)

    def _look(self, step: int) -> None:
        loss = self.look()
        self.tell(step, loss)
        self.found.append((step, loss))
        if self.keeps and not math.isnan(loss) and self._best() == len(self.found) - 1:
            self.best = {name: adamw.whole_on_cpu(weight) for name, weight in self.weights.items()}
        self.stop = self.patience is not None and len(self.found) - 1 - self._best() >= self.patience

    def _best(self) -> int:
        """Place of the best look, the first of equals. No number is worse than any."""
        losses = [loss for _, loss in self.found]
        return min(range(len(losses)), key=lambda place: (math.isnan(losses[place]), losses[place]))

    def finish(self) -> None:
        """Put the best weights into the model, if they are to be kept."""
        if self.best:
            put(self.weights, self.best)

    @property
    def record(self) -> dict[str, Any]:
        """Every look, and which step's weights are written."""
        if not self.found:
            return {"looks": []}
        best = self.found[self._best()]
        return {
            "looks": [{"step": step, "loss": loss} for step, loss in self.found],
            "best_step": best[0],
            "written_step": best[0] if self.best else self.found[-1][0],
            "stopped_early": self.stop and self.found[-1][0] < self.total,
        }

    def state_dict(self) -> dict[str, Any]:
        """Looks and best weights."""
        return {"found": self.found, "best": self.best, "stop": self.stop}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on looking."""
        self.found = [(step, loss) for step, loss in state["found"]]
        self.best, self.stop = dict(state["best"]), state["stop"]


def look_of(
    config: TrainConfig,
    objective: Objective,
    bins: PackedBins | None,
    model: Any,
    loss: LossSums,
    baseline: LossSums | None,
    device: str,
    cast: bool,
    group: Group,
    sharded: bool,
) -> Callable[[], float] | None:
    """What measures the loss of held-out bins, if there are to be looks at it. `cast` is whether autocast casts weights
    to the precision. Raises UserError when no row is held out."""
    if bins is None:
        return None
    if not bins.trained.sum():
        raise UserError(
            "train.evaluate_every: the plan holds no rows out: set pack.heldout_fraction, or `split: heldout` on a "
            "source"
        )
    total = len(bins)
    # As many batches on every rank: sharded ones compute together, and each must know the names of the sums.
    dealt = range(group.rank, -(-total // group.size) * group.size, group.size)

    def batches() -> Iterator[tuple[Any, int]]:
        for number in dealt:
            batch = to_device(objective.prepare(collate([bins[number % total]])), device)
            yield batch, objective.count(bins, [number]) if number < total else 0

    arithmetic = partial(speed.autocast, model, config, device) if cast else nullcontext
    look = _measuring(model, batches, loss, baseline, arithmetic, group.sum)
    return partial(_look_sharded, look, loss, group.size) if sharded else look


def _look_sharded(look: Callable[[], float], loss: Any, ranks: int) -> float:
    """A look by a loss whose model `stages.train.sharding.shard` has cut, which is as many times too large."""
    try:
        return look() / ranks
    finally:
        loss.reshard()  # no backward pass does it, and what stays gathered would be written in 16 bits


def _measuring(
    model: nn.Module,
    batches: Callable[[], Iterator[tuple[Any, int]]],
    loss: LossSums,
    baseline: LossSums | None,
    arithmetic: Callable[[], Any],
    over_ranks: Callable[[Tensor], Tensor],
) -> Callable[[], float]:
    """A function that measures the mean loss over this rank's prepared batches, each with the number of what its losses
    are counted by (trained tokens, documents or pairs; none is a batch that another rank measures), in a block of some
    arithmetic; against a `baseline` over all of them, where the objective has one. `over_ranks` adds up, so that all
    ranks find the same."""

    def means(sums: LossSums, more: dict[str, Any]) -> dict[str, Tensor]:
        total: dict[str, float] = {}
        counted = 0
        for prepared, count in batches():
            counted += count
            for name, found in sums(prepared | more).items():
                total[name] = total.get(name, 0.0) + (float(found) if count else 0.0)
        here = [*total.values(), float(counted)]
        added = over_ranks(torch.tensor(here, dtype=torch.float64, device=next(model.parameters()).device))
        return {name: (value / added[-1]).float() for name, value in zip(total, added[:-1], strict=True)}

    def look() -> float:
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), arithmetic():
                known = {"baseline": means(baseline, {})} if baseline is not None else {}
                return float(means(loss, known)["loss"])
        finally:
            model.train(training)

    return look
