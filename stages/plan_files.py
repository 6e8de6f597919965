"""The plan as files: `documents.arrow` and `bins.arrow`, whose columns `stages.tables` describes.

A document is one sequence of tokens. The sequences of one row (a preference's chosen and rejected answer) are packed as
one piece, so they stand side by side in one bin.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packing.plan import Plan, pack
from stages.tables import BATCH_ROWS, BINS, documents_schema, read_table
from stages.tokenized import Files, Numbers, Rows, Shard, consecutive


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
    windows: Numbers | None = None,
) -> Plan:
    """Pack the `chosen` rows (by number; as often as they are listed) and write them and their bins.

    `windows` [chosen] numbers the window of each. Returns the plan with its documents being sequences.
    """
    width = rows.sequences
    sequences = (chosen[:, None] * width + np.arange(width)).ravel()
    lengths, trained = rows.used.ravel()[sequences], rows.trained.ravel()[sequences]
    pieces = pack(
        rows.used[chosen].sum(axis=1),
        sequence_length,
        global_batch=global_batch,
        seed=seed,
        max_documents=max_documents and max_documents // width,
        windows=windows,
    )
    places: NDArray[np.uint32] = np.add.outer(pieces.documents * np.uint32(width), np.arange(width, dtype=np.uint32))
    plan = Plan(places.ravel(), pieces.offsets * width, pieces.windows)
    _write_documents(folder / f"{prefix}documents.arrow", rows, chosen, sequences, shards, sequence_length)
    bins = [
        _lists(BINS, "documents", plan.offsets, pa.array(plan.documents)),
        pa.array(_sums(lengths[plan.documents], plan.offsets), pa.uint32()),
        pa.array(_sums(trained[plan.documents], plan.offsets), pa.uint32()),
    ]
    _write_columns(folder / f"{prefix}bins.arrow", BINS, bins)
    return plan


def write_heldout_tokens(folder: Path, files: Files, shards: Sequence[Shard], rows: Rows, holding: Numbers) -> None:
    """Copy the tokens of the rows `holding` (by number), so that who measures on them needs no shard."""
    width = rows.sequences
    parts = []
    numbers = np.unique(rows.shard[holding])
    for number, shard in zip(numbers, files.in_turn([shards[n] for n in numbers]), strict=True):
        places = rows.place[holding[rows.shard[holding] == number]][:, None] + np.arange(width, dtype=np.uint32)
        parts.append(read_table(files.tokens / shard.path / "tokens.arrow").take(pa.array(places.ravel())))
    if parts:
        table = pa.concat_tables(parts).combine_chunks()
        _write_columns(folder / "heldout_tokens.arrow", table.schema, table.columns)


def _write_documents(
    path: Path, rows: Rows, chosen: Numbers, sequences: Numbers, shards: int, sequence_length: int
) -> None:
    """One line a sequence, row after row."""
    schema = documents_schema(shards, sequence_length)
    width = rows.sequences
    counts = rows.ranges.ravel()
    picked = consecutive(np.cumsum(counts)[sequences] - counts[sequences], counts[sequences])
    bounds = schema.field("trained").type.value_type
    ranges = pa.StructArray.from_arrays(
        [pa.array(each[picked]).cast(bounds.field(0).type) for each in (rows.starts, rows.ends)], fields=list(bounds)
    )
    place = rows.place[chosen][:, None] + np.arange(width, dtype=np.uint32)
    columns = [
        pa.array(np.repeat(rows.shard[chosen], width)).cast(schema.field("shard").type),
        pa.array(place.ravel()),
        pa.array(np.repeat(rows.number[chosen], width)),
        pa.array(rows.used.ravel()[sequences]).cast(schema.field("length").type),
        _lists(schema, "trained", np.append(0, np.cumsum(counts[sequences])), ranges),
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
