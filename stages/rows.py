"""Reading the rows of one shard, whatever file they came in: JSON Lines, JSON, CSV, Parquet or Arrow.

Everything but `.json` streams. A row that cannot be read comes out as a `BadRow` in its place, so that the reader
decides whether to stop there. NaN, by which pandas says that a cell is empty, is read as null.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from stages import exact_json
from stages.errors import UserError
from stages.formats import BadRow
from stages.sources.batches import retyped

LONGEST = 1 << 28
"""Bytes that a line, or one field of a CSV file, may have: a row must fit into memory several times."""

AHEAD = 1 << 20
"""Bytes of a file of lines that are read at once."""

Row = dict[str, Any]
Place = str
"""Where a row stands in its file, for people: `line 17` or `row 17`, counted from 1."""


def read_rows(path: Path, name: str, first: int = 1) -> Iterator[tuple[Place, Row | BadRow]]:
    """The rows of a file in order. `name` is what messages call it, `first` the number of its first line or row.

    Raises UserError when the file as a whole cannot be read.
    """
    try:
        yield from _READERS[path.suffix](path, first)
    except _Unreadable as error:
        raise UserError(f"{name}{error}") from error


class _Unreadable(Exception):
    """The file as a whole is not what its suffix says. The text goes after the file's name."""


def _jsonl(path: Path, first: int) -> Iterator[tuple[Place, Row | BadRow]]:
    with path.open("rb", buffering=AHEAD) as file:
        for number, line in enumerate(_lines(file, path.stat().st_size), first):
            if number == first:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line and not line.isspace():
                yield f"line {number}", _parsed(line) if len(line) <= LONGEST else _TOO_LONG


_TOO_LONG = BadRow("too long", f"has more than {LONGEST >> 20} MiB: expected a row that fits into memory")


def _lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The lines of a file of `size` bytes, one that is too long cut behind its limit."""
    if size <= LONGEST:
        yield from file
        return
    while line := file.readline(LONGEST + 1):
        more = line
        while len(more) > LONGEST and not more.endswith(b"\n"):
            more = file.readline(LONGEST + 1)
        yield line


def _parsed(line: bytes) -> Row | BadRow:
    try:
        row = exact_json.loads(line, _constant)
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"is not UTF-8 text: {error}")
    except json.JSONDecodeError as error:
        if error.pos >= len(line.rstrip()) - 1 and line.lstrip()[:1] in b"{[":
            told = "is not JSON by itself: expected a whole {...} in each line, or one [{...}, ...]"
            return BadRow("not JSON", told)
        return BadRow("not JSON", f"is not JSON: {error.msg} (column {error.colno})")
    except (RecursionError, ValueError) as error:  # too deep, or a number of too many digits
        return BadRow("not JSON", f"is not JSON: {error}")
    return row if isinstance(row, dict) else BadRow("not an object", "is not an object: expected {...}")


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _json(path: Path, first: int) -> Iterator[tuple[Place, Row | BadRow]]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
    if data.startswith(b"{"):  # many a .json holds JSON Lines
        yield from _jsonl(path, first)
        return
    try:
        rows = exact_json.loads(data, _constant)
    except (RecursionError, ValueError) as error:
        raise _Unreadable(f" is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise _Unreadable(" holds no list of rows: expected [{...}, ...] or one {...} a line")
    for number, row in enumerate(rows, first):
        yield f"row {number}", row if isinstance(row, dict) else BadRow("not an object", "is not an object")


def _csv(path: Path, first: int) -> Iterator[tuple[Place, Row | BadRow]]:
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _must_differ(reader.fieldnames or ())
            for row in reader:
                place = f"line {first - 1 + reader.line_num}"
                if None in row or None in row.values():
                    width = len(reader.fieldnames or ())
                    yield place, BadRow("wrong number of columns", f"has not the {width} columns of the header")
                else:
                    yield place, row
        except csv.Error as error:
            raise _Unreadable(f", line {first - 1 + reader.line_num}: is not CSV: {error}") from error
        except UnicodeDecodeError:  # of what the reader has read ahead
            number, told = _not_utf8(path)
            raise _Unreadable(f", line {first - 1 + number}: is not UTF-8 text: {told}; save it as UTF-8") from None


def _not_utf8(path: Path) -> tuple[int, str]:
    """The first line that is not UTF-8, counted as the CSV reader counts, and what is wrong with it."""
    with path.open(encoding="latin-1", newline="") as file:  # where each byte is a character
        for number, line in enumerate(file, 1):
            try:
                line.encode("latin-1").decode()
            except UnicodeDecodeError as error:
                return number, str(error)
    raise AssertionError(f"{path} is UTF-8")


def _parquet(path: Path, first: int) -> Iterator[tuple[Place, Row | BadRow]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _numbered((batch for batch in file.iter_batches(batch_size=1024)), first)
    except pa.ArrowInvalid as error:
        raise _Unreadable(f" is not Parquet: {error}") from error


def _arrow(path: Path, first: int) -> Iterator[tuple[Place, Row | BadRow]]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
            except pa.ArrowInvalid:  # the datasets library writes the stream form
                source.seek(0)
                yield from _numbered(pa.ipc.open_stream(source), first)
            else:
                yield from _numbered((file.get_batch(i) for i in range(file.num_record_batches)), first)
    except pa.ArrowInvalid as error:
        raise _Unreadable(f" is not Arrow: {error}") from error


def _numbered(batches: Iterator[Any], first: int) -> Iterator[tuple[Place, Row | BadRow]]:
    number = first
    for batch in batches:
        _must_differ(batch.schema.names)
        objects = [field.name for field in batch.schema if _has_objects(field.type)]
        numbers = [field.name for field in batch.schema if _has_numbers(field.type)]
        for row in _rows_of(batch):
            if isinstance(row, dict):
                for name in numbers:
                    row[name] = _without_nan(row[name])
                for name in objects:
                    row[name] = _without_nulls(row[name])
            yield f"row {number}", row
            number += 1


def _must_differ(names: Sequence[str]) -> None:
    """Raises _Unreadable for two columns of one name. Those without any are left: nothing in a recipe can mean them."""
    seen: set[str] = set()
    for name in names:
        if name and name in seen:
            raise _Unreadable(f" has two columns named {name!r}: expected names that differ; rename or leave out one")
        seen.add(name)


_CANNOT = (ValueError, ArithmeticError, LookupError, NotImplementedError)
"""What Arrow raises, or Python where Arrow asks it, for a value that Python's types cannot hold."""


def _rows_of(batch: Any) -> list[Row | BadRow]:
    if not any(map(_has_maps, batch.schema.types)):
        try:
            rows: list[Row | BadRow] = batch.to_pylist()
            return rows
        except _CANNOT:  # seldom, and then slowly: column by column
            pass
    columns = {name: _values(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    return [_row(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _has_maps(kind: Any) -> bool:
    return "map<" in str(kind)


def _pylist(column: Any) -> list[Any]:
    """A column's values as Python has them, a map as an object: by itself Arrow makes a list of pairs of it."""
    values: list[Any] = column.to_pylist(maps_as_pydicts="strict") if _has_maps(column.type) else column.to_pylist()
    return values


def _row(values: Row) -> Row | BadRow:
    return next((value for value in values.values() if isinstance(value, BadRow)), values)


def _values(name: str, column: Any) -> list[Any]:
    """A column's values: with its times as text if Python's cannot hold one, a `BadRow` in the place of any other."""
    try:
        return _pylist(column)
    except _CANNOT as error:
        told = error
    try:
        return _pylist(_times_as_text(column))
    except _CANNOT:
        if len(column) > 1:
            return [value for row in range(len(column)) for value in _values(name, column.slice(row, 1))]
    if isinstance(told, UnicodeDecodeError):
        return [BadRow("not UTF-8", f"{name} is not UTF-8 text: {told}")]
    return [BadRow("unreadable value", f"{name} holds what cannot be read: {told}; leave the column out of the file")]


def _times_as_text(column: Any) -> Any:
    """Python's times have no nanoseconds, no year 10000 and not every time zone; Arrow's text has."""
    import pyarrow as pa

    def text(kind: Any) -> Any:
        return pa.string() if pa.types.is_temporal(kind) else kind

    def in_utc(kind: Any) -> Any:
        return pa.timestamp(kind.unit, "UTC") if pa.types.is_timestamp(kind) and kind.tz else kind

    try:
        return column.cast(retyped(column.type, text))
    except pa.ArrowInvalid:  # Arrow does not know the time zone either; what it stores is UTC
        column = column.cast(retyped(column.type, in_utc))
        return column.cast(retyped(column.type, text))


def _has_objects(kind: Any) -> bool:
    return str(kind).find("struct<") >= 0


def _has_numbers(kind: Any) -> bool:
    """Whether a column holds numbers that may be NaN, as they are or in objects; not those of a vector."""
    import pyarrow as pa

    return bool(pa.types.is_floating(kind)) or (_has_objects(kind) and re.search("float|double", str(kind)) is not None)


def _without_nulls(value: Any) -> Any:
    """A value without the nulls that columns put into objects which lack a key that others have."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path, int], Iterator[tuple[Place, Row | BadRow]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}

SUFFIXES = ", ".join(_READERS)
"""The file types that can be read, for messages."""
