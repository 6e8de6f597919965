"""Parquet and Arrow files become pieces of Arrow record batches.

A piece is an Arrow IPC file, compressed, in batches of at most 1024 rows, without dictionaries and schema metadata.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from stages.sources.pieces import CHUNK, PIECE, Pieces

BATCH_ROWS = 1024


def batches(file: BinaryIO, kind: str, pieces: Pieces) -> Iterator[Any]:
    """The record batches of a Parquet or Arrow file on the disk.

    Raises UserError when it is something else, or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == ".parquet":
            with pq.ParquetFile(file, buffer_size=CHUNK) as parquet:
                yield from parquet.iter_batches(batch_size=BATCH_ROWS)
            return
        with pa.memory_map(os.fsencode(file.name)) as mapped:  # one batch may be as large as the file
            try:
                arrow = pa.ipc.open_file(mapped)
            except pa.ArrowInvalid:  # the datasets library writes the stream form
                mapped.seek(0)
                found = iter(pa.ipc.open_stream(mapped))
            else:
                found = (arrow.get_batch(number) for number in range(arrow.num_record_batches))
            for batch in found:
                batch.validate(full=True)  # Arrow trusts its own files, and would read outside of a damaged one
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise pieces.wrong(f" is not {kind.removeprefix('.').capitalize()}, or damaged: {_told(error)}") from error


def _told(error: Exception) -> str:
    return " ".join(str(error).split())


def cut_batches(batches: Iterable[Any], pieces: Pieces) -> int:
    """Write Arrow record batches as pieces; return how many rows. Where the schema changes, a new piece begins.

    Raises UserError for what Arrow itself cannot write out.
    """
    import pyarrow as pa

    options = pa.ipc.IpcWriteOptions(compression="zstd")
    writer: Any = None
    schema: Any = None
    row, size = 1, 0
    try:
        for batch in (plain(small) for large in batches for small in _slices(_takeable(large))):
            if pieces.left is not None:
                batch = batch.slice(0, pieces.left)
                pieces.took(batch.num_rows)
            if writer is not None and (size >= PIECE or batch.schema != schema):
                writer.close()
                writer = None
            if writer is None:
                schema, size = batch.schema, 0
                writer = pa.ipc.new_file(str(pieces.new(".arrow", row)), schema, options=options)
            writer.write_batch(batch)
            row += batch.num_rows
            size += batch.nbytes
            if pieces.full:
                break
    except pa.ArrowException as error:
        told = f"Arrow cannot write it out: {_told(error)}. Leave that column out, or save the rows as JSON Lines"
        raise pieces.wrong(f", row {row} or a later one: {told}") from error
    finally:
        if writer is not None:
            writer.close()
    return row - 1


def _takeable(batch: Any) -> Any:
    """The batch, with texts and bytes that Arrow can only view made such that it can take them out of a dictionary."""
    import pyarrow as pa

    def taken(array: Any) -> Any:
        kind = array.type.value_type if pa.types.is_dictionary(array.type) else None
        if kind is None or not (pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)):
            return array
        values = array.dictionary.cast(pa.large_string() if pa.types.is_string_view(kind) else pa.large_binary())
        return pa.DictionaryArray.from_arrays(array.indices, values)

    return pa.RecordBatch.from_arrays(list(map(taken, batch.columns)), names=batch.schema.names)


def plain(batch: Any) -> Any:
    """The batch without schema metadata, and with dictionaries written out: a file can hold one of a column only."""
    import pyarrow as pa

    return pa.RecordBatch.from_arrays(list(map(_written_out, batch.columns)), names=batch.schema.names)


def _written_out(array: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = retyped(array.type, lambda kind: kind)
    try:
        # Of a slice of lists, a cast alone would cast what all of them hold.
        return array if kind == array.type else pa.concat_arrays([array]).cast(kind)
    except pa.ArrowNotImplementedError:  # a dictionary of lists or objects within others: a file can hold one
        return array


def retyped(kind: Any, made: Callable[[Any], Any]) -> Any:
    """An Arrow type with what `made` makes of each type within it that holds no others, and without dictionaries."""
    import pyarrow as pa

    def inner(field: Any) -> Any:
        return field.with_type(retyped(field.type, made))

    if pa.types.is_dictionary(kind):
        return retyped(kind.value_type, made)
    if pa.types.is_struct(kind):
        return pa.struct([inner(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field), kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(inner(kind.value_field))
    return pa.list_(inner(kind.value_field)) if pa.types.is_list(kind) else made(kind)


def _slices(batch: Any) -> Iterator[Any]:
    """A batch in slices of at most `BATCH_ROWS` rows and, but for a single row, `PIECE` bytes once written out."""
    if batch.num_rows <= BATCH_ROWS and (batch.num_rows <= 1 or sum(map(_size, batch.columns)) <= PIECE):
        if batch.num_rows:
            yield batch
        return
    step = min(BATCH_ROWS, max(1, batch.num_rows // 2))
    for start in range(0, batch.num_rows, step):
        yield from _slices(batch.slice(start, step))


def _size(array: Any) -> int:
    """Bytes of a column once written out. Of a dictionary's texts that is told without writing out any: one of them may
    be megabytes, and stand in every row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type.value_type if pa.types.is_dictionary(array.type) else None
    if kind not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        return int(_written_out(array).nbytes)
    lengths = pc.binary_length(array.dictionary).take(array.indices)
    return int(array.indices.nbytes) + int(pc.sum(lengths).as_py() or 0)
