"""Parquet and Arrow files become pieces of Arrow record batches.

A piece is an Arrow IPC file, compressed, in batches of at most 1024 rows, without dictionaries and schema metadata.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from stages.sources.pieces import CHUNK, PIECE, Pieces

BATCH_ROWS = 1024


def batches(file: BinaryIO, kind: str, pieces: Pieces) -> Iterator[Any]:
    """The record batches of a Parquet or Arrow file. Raises UserError when it is something else, or is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == ".parquet":
            with pq.ParquetFile(file, buffer_size=CHUNK) as parquet:
                yield from parquet.iter_batches(batch_size=BATCH_ROWS)
            return
        try:
            arrow = pa.ipc.open_file(file)
        except pa.ArrowInvalid:  # the datasets library writes the stream form
            file.seek(0)
            found = iter(pa.ipc.open_stream(file))
        else:
            found = (arrow.get_batch(number) for number in range(arrow.num_record_batches))
        for batch in found:
            batch.validate(full=True)  # Arrow trusts its own files, and would read outside of a damaged one
            yield batch
    except (pa.ArrowException, OSError) as error:
        told = " ".join(str(error).split())
        raise pieces.wrong(f" is not {kind.removeprefix('.').capitalize()}, or damaged: {told}") from error


def cut_batches(batches: Iterable[Any], pieces: Pieces) -> int:
    """Write Arrow record batches as pieces; return how many rows. Where the schema changes, a new piece begins."""
    import pyarrow as pa

    options = pa.ipc.IpcWriteOptions(compression="zstd")
    writer: Any = None
    schema: Any = None
    row, size = 1, 0
    try:
        for batch in (small for large in batches for small in _slices(plain(large))):
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
    finally:
        if writer is not None:
            writer.close()
    return row - 1


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
        return array if kind == array.type else array.cast(kind)
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
    """A batch in slices of at most `BATCH_ROWS` rows and, but for a single row, `PIECE` bytes."""
    if batch.num_rows <= BATCH_ROWS and (batch.nbytes <= PIECE or batch.num_rows == 1):
        if batch.num_rows:
            yield batch
        return
    step = min(BATCH_ROWS, max(1, batch.num_rows // 2))
    for start in range(0, batch.num_rows, step):
        yield from _slices(batch.slice(start, step))
