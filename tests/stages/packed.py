"""Shards of tokens made by hand for tests of pack, and what a run of pack gave."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from packing.collate import IGNORED, PackedBins
from stages.marks import ORIGIN_CONTENT, ORIGIN_END, ORIGIN_TEMPLATE, TRAIN_UNSET, kind_of
from stages.pack import STAGE, PackConfig
from stages.runtime import Runtime
from stages.stage import Work
from stages.tables import read_table
from tests.stages.tiny import write_tokens

TOKENIZER = Path(__file__).parents[1] / "golden" / "model"

Span = tuple[int, int, int, int, str, int]
"""start, end, origin, turn, role, train"""


def spans(*items: Span) -> list[dict[str, Any]]:
    return [
        {"end": end, "turn": turn, "kind": kind_of(origin, role, train)} for _, end, origin, turn, role, train in items
    ]


def turns(*told: tuple[str, int] | tuple[str, int, int]) -> list[dict[str, Any]]:
    """A conversation of (role, content tokens, train flag): each turn has 2 tokens of header and 1 that ends it."""
    found: list[Span] = []
    at = 0
    for turn, (role, size, *flag) in enumerate(told):
        train = flag[0] if flag else TRAIN_UNSET
        for length, origin in ((2, ORIGIN_TEMPLATE), *[(size, ORIGIN_CONTENT)] * bool(size), (1, ORIGIN_END)):
            found.append((at, at + length, origin, turn, role, train))
            at += length
    return spans(*found)


def row(*told: tuple[str, int] | tuple[str, int, int], identity: str | None = None) -> dict[str, Any]:
    """A row whose identity is drawn from its own count unless given."""
    made = turns(*told)
    row.count = getattr(row, "count", 0) + 1  # type: ignore[attr-defined]
    digest = hashlib.sha256((identity or f"row {row.count}").encode()).digest()[:16]  # type: ignore[attr-defined]
    return {"ids": list(range(made[-1]["end"])), "spans": made, "identity": digest, "extra": ""}


def shard(
    folder: Path,
    path: str,
    rows: Sequence[dict[str, Any]],
    split: str = "train",
    dropped: dict[str, int] | None = None,
    kind: str = "conversation",
    count: int | None = None,
    absent: Sequence[str] = (),
    unread: dict[str, int] | None = None,
) -> None:
    """`count` is how many rows the sequences in `rows` are, if not as many."""
    numbered = [{"row": 100 + i, **each} for i, each in enumerate(rows)]
    counts = {
        **write_tokens(folder / path, 50_000, numbered, extra=kind != "conversation"),
        "kind": kind,
        "rows": (len(rows) if count is None else count) + sum((dropped or {}).values()),
        "dropped": dropped or {},
        "source": path.split("/")[0],
        "split": split,
        **({"absent": list(absent)} if absent else {}),
        **({"unread": unread} if unread else {}),
    }
    (folder / path / "counts.json").write_text(json.dumps(counts))


class Packed:
    """What one run of the stage gave."""

    def __init__(self, tokens: Path, output: Path, **config: Any) -> None:
        output.mkdir(parents=True)
        settings = PackConfig(**{"sequence_length": 64, "global_batch": 2, **config})
        inputs = {"spans": tokens, "tokens": tokens, "tokenizer": TOKENIZER}
        runtime = Runtime(cache=output.parents[1] / "cache")  # shared by all tests of a session
        self.facts = STAGE.run(settings, inputs, output, Work(output.parent / "work", runtime))
        self.output = output
        self.plan = json.loads((output / "plan.json").read_text())
        self.report = json.loads((output / "report.json").read_text())
        self.bins = PackedBins(tokens, output)
        self.heldout = PackedBins(None, output)

    def rows(self, heldout: bool = False) -> set[tuple[str, int]]:
        table = read_table(self.output / f"{'heldout_' if heldout else ''}documents.arrow")
        shards, places = (table.column(name).to_pylist() for name in ("shard", "row"))
        return {(self.plan["shards"][number]["path"], place) for number, place in zip(shards, places, strict=True)}


def labels(bins: PackedBins) -> Iterator[list[int]]:
    """Positions that train, document by document (ids count from 0 in every row)."""
    for number in range(len(bins)):
        each = bins[number]
        for part in np.split(each.labels, np.cumsum(each.lengths)[:-1]):
            yield part[part != IGNORED].tolist()
