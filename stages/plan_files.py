"""The plan as files: `documents.arrow` and `bins.arrow`, whose columns `stages.tables` describes.

A document is one sequence of tokens. The sequences of one row (a preference's chosen and rejected answer) are packed
together, so they stand side by side in one bin. Of wrapped documents each piece is one here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packing.plan import Plan, pack
from packing.wrap import Pieces, wrap
from stages.tables import BATCH_ROWS, BINS, Numbers, documents_schema, read_table
from stages.tokenized import Files, Rows, Shard, by_shard, consecutive


@dataclass(frozen=True)
class Documents:
    """What stands in `documents.arrow`: row after row, and of a row sequence after sequence, or piece after piece."""

    row: Numbers
    """[documents] The number of the row in `Rows`."""
    part: Numbers
    """[documents] Which of the row's sequences it is."""
    begin: Numbers | None
    """[documents] The first token of a piece within its sequence; None where documents are whole."""
    length: Numbers
    """[documents] Tokens."""
    ranges: Numbers
    """[documents] How many ranges of it train."""
    starts: NDArray[np.integer[Any]]
    """[ranges] Where they start, counted from the document's first token."""
    ends: NDArray[np.integer[Any]]

    @property
    def count(self) -> int:
        """How many there are, however many pieces each is in."""
        return len(self.row) if self.begin is None else int((self.begin == 0).sum())

    @property
    def trained(self) -> Numbers:
        """[documents] Trained tokens."""
        tokens = np.append(0, np.cumsum(self.ends - self.starts, dtype=np.int64))
        found: Numbers = np.diff(tokens[np.append(0, np.cumsum(self.ranges))])
        return found


def write(
    folder: Path,
    prefix: str,
    rows: Rows,
    chosen: Numbers,
    *,
    shards: int,
    sequence_length: int,
    global_batch: int,
    max_documents: int | None,
    seed: int,
    wrapped: bool,
    windows: Numbers | None = None,
) -> tuple[Documents, Plan]:
    """Pack the `chosen` rows (by number; as often as they are listed) and write them and their bins.

    `windows` [chosen] numbers the window of each. Returns what was written.
    """
    if wrapped:
        pieces, plan = wrap(
            rows.used[chosen, 0], sequence_length, global_batch=global_batch, seed=seed, windows=windows
        )
        documents = _pieces(rows, chosen[pieces.document], pieces)
    else:
        width = rows.sequences
        documents = _whole(rows, chosen)
        together = pack(
            rows.used[chosen].sum(axis=1),
            sequence_length,
            global_batch=global_batch,
            seed=seed,
            max_documents=max_documents and max_documents // width,
            windows=windows,
        )
        places = np.add.outer(together.documents * np.uint32(width), np.arange(width, dtype=np.uint32))
        plan = Plan(places.ravel(), together.offsets * width, together.windows)
    _write_documents(folder / f"{prefix}documents.arrow", rows, documents, shards, sequence_length)
    bins = [
        _lists(BINS, "documents", plan.offsets, pa.array(plan.documents)),
        pa.array(_sums(documents.length[plan.documents], plan.offsets), pa.uint32()),
        pa.array(_sums(documents.trained[plan.documents], plan.offsets), pa.uint32()),
    ]
    _write_columns(folder / f"{prefix}bins.arrow", BINS, bins)
    return documents, plan


def write_heldout_tokens(folder: Path, files: Files, shards: Sequence[Shard], rows: Rows, documents: Documents) -> None:
    """Copy the tokens of held-out documents, so that who measures on them needs no shard."""
    parts = []
    shard_of = rows.shard[documents.row]
    places = rows.place[documents.row] + documents.part
    numbers, of_shard = np.unique(shard_of), by_shard(shard_of, len(shards))
    for number, shard in zip(numbers, files.in_turn([shards[n] for n in numbers]), strict=True):
        own = of_shard[number]
        table = read_table(files.tokens / shard.path / "tokens.arrow")
        if documents.begin is None:
            parts.append(table.take(pa.array(places[own])))
        else:
            parts.append(_cut(table, places[own], documents.begin[own], documents.length[own]))
    if parts:
        table = pa.concat_tables(parts).combine_chunks()
        _write_columns(folder / "heldout_tokens.arrow", table.schema, table.columns)


def _whole(rows: Rows, chosen: Numbers) -> Documents:
    """All sequences of the chosen rows."""
    width = rows.sequences
    sequences = (chosen[:, None] * width + np.arange(width)).ravel()
    counts = rows.ranges.ravel()
    picked = consecutive(np.cumsum(counts)[sequences] - counts[sequences], counts[sequences])
    return Documents(
        row=np.repeat(chosen, width),
        part=np.tile(np.arange(width), len(chosen)),
        begin=None,
        length=rows.used.ravel()[sequences],
        ranges=counts[sequences],
        starts=rows.starts[picked],
        ends=rows.ends[picked],
    )


def _pieces(rows: Rows, row: Numbers, pieces: Pieces) -> Documents:
    """Pieces of rows [pieces] of one sequence each. Of a piece, what trains is what trains of its row, but for the
    first token: it begins either the row or a packed sequence, where nothing comes before it."""
    counts = rows.ranges[row, 0]
    picked = consecutive(np.cumsum(rows.ranges[:, 0])[row] - counts, counts)
    piece = np.repeat(np.arange(len(row)), counts)
    starts = np.maximum(rows.starts[picked] - pieces.begin[piece], 1)
    ends = np.minimum(rows.ends[picked] - pieces.begin[piece], pieces.length[piece])
    some = starts < ends
    return Documents(
        row=row,
        part=np.zeros(len(row), np.int64),
        begin=pieces.begin,
        length=pieces.length,
        ranges=np.bincount(piece[some], minlength=len(row)),
        starts=starts[some],
        ends=ends[some],
    )


def _cut(table: pa.Table, places: Numbers, begin: Numbers, length: Numbers) -> pa.Table:
    """Of a table of ids: `length` tokens from `begin` on of the rows at some places, one after another."""
    taken, row = np.unique(places, return_inverse=True)
    column = table["ids"].take(pa.array(taken)).combine_chunks()
    before = column.offsets.to_numpy()[:-1].astype(np.int64)[row]
    values = column.values.take(pa.array(consecutive(before + begin, length)))
    return pa.table([_lists(table.schema, "ids", np.append(0, np.cumsum(length)), values)], schema=table.schema)


def _write_documents(path: Path, rows: Rows, documents: Documents, shards: int, sequence_length: int) -> None:
    """One line a document."""
    schema = documents_schema(shards, sequence_length, documents.begin is not None)
    bounds = schema.field("trained").type.value_type
    ranges = pa.StructArray.from_arrays(
        [pa.array(each).cast(bounds.field(0).type) for each in (documents.starts, documents.ends)], fields=list(bounds)
    )
    row = documents.row
    columns = [
        pa.array(rows.shard[row]).cast(schema.field("shard").type),
        pa.array(rows.place[row] + documents.part).cast(pa.uint32()),
        pa.array(rows.number[row]),
        pa.array(documents.length).cast(schema.field("length").type),
        _lists(schema, "trained", np.append(0, np.cumsum(documents.ranges)), ranges),
        *([] if documents.begin is None else [pa.array(documents.begin).cast(pa.uint32())]),
    ]
    _write_columns(path, schema, columns)


def _sums(values: Numbers, offsets: NDArray[np.int64]) -> Numbers:
    """Sums of consecutive runs of values; no run is empty."""
    sums: Numbers = np.add.reduceat(values, offsets[:-1]) if len(offsets) > 1 else values
    return sums


def _lists(schema: pa.Schema, name: str, offsets: Numbers, values: pa.Array) -> pa.ChunkedArray:
    """A list column in pieces, each with 32-bit offsets of its own."""
    kind = schema.field(name).type
    return pa.chunked_array(
        [
            pa.ListArray.from_arrays(
                pa.array(offsets[low : low + BATCH_ROWS + 1] - offsets[low], pa.int32()),
                values.slice(offsets[low], offsets[min(low + BATCH_ROWS, len(offsets) - 1)] - offsets[low]),
                type=kind,
            )
            for low in range(0, len(offsets) - 1, BATCH_ROWS)
        ],
        kind,
    )


def _write_columns(path: Path, schema: pa.Schema, columns: Iterable[Any]) -> None:
    table = pa.Table.from_arrays(list(columns), schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table, max_chunksize=BATCH_ROWS)
