"""Training objectives: one a file, named in a recipe by its file's name (`train.objective: sft`).

An objective file declares `OBJECTIVE = Objective(...)`. Both training and evaluation use it, so that the loss that is
reported on held-out rows is the loss that was trained.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from stages.errors import UserError
from stages.stage import StageConfig

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "LossSums", "Objective", "Online", "Sums", "find", "names", "options_of"]

Batch = Mapping[str, Any]
"""A collated micro-batch: tensors by name, as `packing.collate` makes them."""
Sums = Mapping[str, "torch.Tensor"]
"""Sums over a micro-batch of what the objective counts: `loss`, which is minimised, and measures that are only looked
at, without gradient. Divided by the count they are means, whatever the micro-batch."""
LossSums = Callable[[Batch], Sums]
"""From a prepared batch on the model's device to its sums."""


class NoOptions(StageConfig):
    """An objective without settings of its own."""


@dataclass(frozen=True)
class Online:
    """Training on what the model itself writes: prompts in, completions that a trainer of TRL's samples."""

    trainer: str
    """TRL's class; its config is the class of the same name with `Config`."""
    settings: Callable[[Any], Mapping[str, Any]]
    """The config's arguments, from the objective's options."""
    teacher: bool = False
    """Whether the trainer has `fetch.teacher` beside the model, to ask about each completion."""


def _not_packed(*_: Any) -> Any:
    raise NotImplementedError("an online objective has no batches of its own")


@dataclass(frozen=True)
class Objective:
    """What training minimises, over packed batches or `online`."""

    version: int
    """Bumped when the same batches and weights would give another loss."""
    prepare: Callable[[Batch], dict[str, Any]] = _not_packed
    """Makes a collated batch ready on the CPU, before it moves to the device."""
    loss: Callable[[Any, Any, Batch], LossSums] = _not_packed
    """`loss(model, options, batch)` returns the function from a prepared batch to its sums. `batch` is an example, with
    which the function may be tried out first."""
    options: type[StageConfig] = NoOptions
    """Its settings in the recipe, `train.objective_options`."""
    kinds: tuple[str, ...] = ("conversation",)
    """The kinds of data it trains on; see `stages.formats`."""
    baseline: Callable[[Any, Any, Batch], LossSums] | None = None
    """Like `loss`, for what a batch's losses are compared with: its sums are found without gradient over the whole step
    first, and their means stand in `batch["baseline"]`, so that a loss does not depend on the micro-batch it is in."""
    counts: Literal["tokens", "documents", "pairs", "labels"] = "tokens"
    """What the loss is a mean of: trained tokens, documents, pairs of documents that stand side by side, or the labels
    of all documents."""
    head: int = 0
    """How many numbers the head gives that replaces the model's own (see `stages.heads`); 0 keeps the model's."""
    reference: bool = False
    """Whether batches must hold `reference` [1, tokens]: the log-probability that the model before training gives each
    token."""
    teacher: bool = False
    """Whether batches must hold `top_ids` and `top_log_probs` [1, tokens, k]: each token's likeliest ones by a teacher,
    and their log-probabilities."""
    online: Online | None = None
    """For objectives that train on the model's own completions: then there is nothing to prepare and no loss here."""

    def count(self, bins: Any, numbers: Sequence[int]) -> int:
        """What the losses of some of a plan's bins (`packing.collate.PackedBins`) are divided by."""
        if self.counts == "tokens":
            return int(bins.trained[numbers].sum())
        if self.counts == "labels":
            from stages.steps import judged

            return sum(len(judged(extra, length)) for extra, length in bins.extras_in(numbers))
        return int(bins.documents_in(numbers)) // (2 if self.counts == "pairs" else 1)


@cache
def names() -> tuple[str, ...]:
    """The objectives there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find(name: str) -> Objective:
    """The objective of that name. Raises UserError listing the choices."""
    if name not in names():
        raise UserError(f"train.objective is {name!r}: choose one of {', '.join(names())}")
    objective = importlib.import_module(f"{__name__}.{name}").OBJECTIVE
    assert isinstance(objective, Objective)
    return objective


def refuse_other_kinds(name: str, kind: str, place: str) -> None:
    """Raise UserError when an objective does not train on the kind of rows that some place holds."""
    kinds = find(name).kinds
    if kind not in kinds:
        raise UserError(
            f"train.objective {name} trains on rows of kind {' or '.join(kinds)}, and {place} holds rows of kind "
            f"{kind}: choose another objective, or read the data in another convert.format"
        )


def options_of(name: str, given: Mapping[str, Any]) -> StageConfig:
    """An objective's settings, defaults filled in. Raises UserError naming the first that does not fit."""
    kind = find(name).options
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        raise UserError(f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}")
    known = list(kind.model_fields)
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
    raise UserError(f"{name} has no option {key!r}: {hint}")
