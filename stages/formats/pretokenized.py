"""Token ids that were made elsewhere, with the tokenizer of the model that is trained.

    {"input_ids": [1, 4093, 28723, 2], "labels": [-100, 4093, 28723, 2], "attention_mask": [1, 1, 1, 1]}

A label of -100 does not train, any other must be the id itself. Without `labels`, what trains is what TRL's
`completion_mask` and `assistant_masks` have a 1 for, each that is there; without these too, everything. Ids whose
`attention_mask` is 0 are padding and are left out. tokenize refuses ids that the vocabulary does not have. A row that
TRL packed, of several `seq_lengths`, is a bad one: each document would see those before it.
"""

from array import array
from collections.abc import Mapping
from itertools import compress
from typing import Any

from stages.formats import BadRow, Conversation, Format, Options, Row, Turn
from stages.formats.messages import runs
from stages.marks import TRAIN_NO, TRAIN_YES
from stages.row_fields import list_at, shown

IGNORED = -100
"""The label that does not train, in PyTorch's cross-entropy and everywhere since."""

MASKS = ("completion_mask", "assistant_masks")
"""What TRL writes beside the ids that it makes: 1 for those of the completion, and for those of the assistant."""


def convert(row: Row, options: Options) -> Conversation:
    """One row to its ids, with runs of those that train. Raises BadRow."""
    ids = _numbers(row, options.name("input_ids"))
    if min(ids) < 0 or max(ids) >= 1 << 32:
        raise BadRow("no token id", f"{options.name('input_ids')} holds {min(ids)} to {max(ids)}: expected token ids")
    if isinstance(lengths := row.get("seq_lengths"), list) and len(lengths) > 1:
        raise BadRow("packed already", f"seq_lengths says that it is {len(lengths)} documents: expected one a row")
    places, seen = _beside(row, "position_ids", ids), _mask(row, options.name("attention_mask"), ids)
    if (begun := sum(not place for place in (compress(places, seen) if seen else places))) > 1:
        raise BadRow("packed already", f"position_ids begins {begun} times: expected one document a row")
    labels = _beside(row, options.name("labels"), ids)
    for learned in [] if labels else filter(None, [_mask(row, options.name(name), ids) for name in MASKS]):
        labels = [label if one else IGNORED for label, one in zip(labels or ids, learned, strict=True)]
    mask = _mask(row, options.name("attention_mask"), ids)
    if mask:
        ids, labels = list(compress(ids, mask)), list(compress(labels, mask))
        if not ids:
            raise BadRow("empty conversation", f"{options.name('attention_mask')} leaves nothing of it")
    flags = [TRAIN_NO if label == IGNORED else TRAIN_YES for label in labels] or [TRAIN_YES] * len(ids)
    if labels and (wrong := [n for n, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, IGNORED)]):
        place = f"{options.name('labels')}[{wrong[0]}]"
        raise BadRow("another label", f"{place} is {labels[wrong[0]]}: expected {ids[wrong[0]]}, its id, or -100")
    return Conversation([Turn("text", "", flags[-1], runs=runs((1, train) for train in flags))], ids=ids)


def _numbers(row: Row, name: str) -> list[int]:
    values = list_at(row, name)
    try:
        if bool in set(map(type, values)):
            raise TypeError("expected whole numbers")
        return array("q", values).tolist()
    except (TypeError, OverflowError):
        wrong = next(n for n, value in enumerate(values) if type(value) is not int or abs(value) >> 62)
        raise BadRow("wrong type", f"{name}[{wrong}] is {shown(values[wrong])}: expected a whole number") from None


def _beside(row: Row, name: str, ids: list[Any]) -> list[int]:
    """A list of one number an id; empty where the row has none."""
    if row.get(name) is None:
        return []
    values = _numbers(row, name)
    if len(values) != len(ids):
        raise BadRow("wrong length", f"{name} has {len(values)} numbers: expected {len(ids)}, one a token")
    return values


def _mask(row: Row, name: str, ids: list[Any]) -> list[int]:
    """The same, of 0 and 1."""
    mask = _beside(row, name, ids)
    if not set(mask) <= {0, 1}:
        raise BadRow("wrong type", f"{name} holds other numbers than 0 and 1")
    return mask


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with `input_ids`."""
    ids = row.get("input_ids")
    return {} if isinstance(ids, list) and ids and type(ids[0]) is int else None


FORMAT = Format(
    convert,
    version=2,
    fields=frozenset({"input_ids", "labels", "attention_mask", *MASKS}),
    templated=False,
    ids=True,
    recognises=recognises,
)
