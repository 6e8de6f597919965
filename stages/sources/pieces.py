"""One fetched file becomes pieces of about 16 MiB, cut between rows.

Two cores can then work on one file, memory stays flat, and rows appended to a file make only its last piece anew: a
cut depends on nothing but the bytes before it. Each piece is a folder, `<number>/rows.<ext>` with `source.json`:

- `source` and `split`, as the recipe has them; `member`, the file's name inside an archive; `file`, the file's number
  from 1 where one part is made of several;
- `first`: what to add, less one, to the numbers of lines or rows counted from 1 in the piece, to get those of the
  file. (A piece of a CSV file repeats the header.)
- `rows_before`: rows of the file before the piece, where these are not `first` less one, as after blank lines.

Names of files are no part of it: the same rows give the same bytes, whatever their file is called.

JSON Lines, CSV and JSON lists keep their text. Rows of Parquet and Arrow are cut in `stages.sources.batches`.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stages.errors import UserError
from stages.identity import Json

PIECE = 16 << 20
"""Bytes after which a piece ends at the next row."""

CHUNK = 4 << 20
"""Bytes read at once."""

_BLANK = b" \t\r\n"
_BOM = codecs.BOM_UTF8
_BLANK_LINE = re.compile(rb"\n(?=[ \t\r\v\f]*\n)")
"""Before each."""


@dataclass
class Pieces:
    """Where the pieces of one fetched file go."""

    folder: Path
    about: dict[str, Json]
    """What every `source.json` says: source and split."""
    name: str
    """What messages call the file."""
    file: int | None = None
    """The number from 1 of the file that is being cut, where one part is made of several."""
    member: str = ""
    """The file inside the archive that is being cut."""
    left: int | None = None
    """How many more rows are wanted; None for all."""
    count: int = 0

    @property
    def full(self) -> bool:
        """Whether no more rows are wanted."""
        return self.left == 0

    def took(self, rows: int = 1) -> None:
        """Count rows that were written."""
        if self.left is not None:
            self.left -= rows

    def new(self, suffix: str, first: int = 1, rows_before: int | None = None) -> Path:
        """The path of the next piece's rows; its `source.json` is written. `rows_before` is `first` less one by
        default."""
        folder = self.folder / f"{self.count:05d}"
        folder.mkdir()
        self.count += 1
        source = {
            **self.about,
            "first": first,
            **({"file": self.file} if self.file else {}),
            **({"member": self.member} if self.member else {}),
            **({"rows_before": rows_before} if rows_before not in (None, first - 1) else {}),
        }
        (folder / "source.json").write_text(json.dumps(source, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
        return folder / f"rows{suffix}"

    def wrong(self, what: str) -> UserError:
        """The error of a file that cannot be read as what its name says."""
        return UserError(f"{self.name}{'/' if self.member else ''}{self.member}{what}")


def cut(stream: BinaryIO, suffix: str, pieces: Pieces) -> None:
    """Cut a stream of JSON Lines, JSON or CSV. Raises UserError where it is something else."""
    if suffix == ".csv":
        _cut_csv(stream, pieces)
    elif suffix == ".json":
        head = stream.read(CHUNK)
        while head.removeprefix(_BOM).isspace() and (more := stream.read(CHUNK)):
            head += more
        text = head.removeprefix(_BOM).lstrip(_BLANK)
        chunks = _chunks(stream, head)
        if text.startswith(b"["):
            _cut_list(chunks, pieces)
        else:  # many a .json holds JSON Lines
            _cut_lines(chunks, ".jsonl" if text.startswith(b"{") else ".json", pieces)
    else:
        _cut_lines(_chunks(stream), suffix, pieces)


def _chunks(stream: BinaryIO, head: bytes = b"") -> Iterator[bytes]:
    if head:
        yield head
    while chunk := stream.read(CHUNK):
        yield chunk


def _first_lines(chunks: Iterable[bytes], pieces: Pieces) -> Iterator[bytes]:
    """As many lines as are wanted, blank ones not counted."""
    blank = True
    for chunk in chunks:
        begin = 0
        while begin < len(chunk):
            end = chunk.find(b"\n", begin) + 1 or len(chunk)
            blank = blank and chunk[begin:end].isspace()
            if chunk[end - 1] == 0x0A:
                pieces.took(not blank)
                blank = True
                if pieces.full:
                    yield chunk[:end]
                    return
            begin = end
        yield chunk
    pieces.took(not blank)  # the last line need not end in a line break, and the next file goes on counting


def _cut_lines(chunks: Iterable[bytes], suffix: str, pieces: Pieces) -> None:
    line, size = 1, 0
    blanks, is_blank = 0, True  # blank lines so far, and whether this one is, as far as it was read
    sink: BinaryIO | None = None
    try:
        for chunk in chunks if pieces.left is None else _first_lines(chunks, pieces):
            begin = 0
            while begin < len(chunk):
                if sink is None:  # a piece does not begin with blank lines: they alone would be none
                    blank = len(chunk) - begin - len(chunk[begin:].lstrip(_BLANK))
                    skipped = chunk.count(b"\n", begin, begin + blank)
                    line, blanks = line + skipped, blanks + skipped
                    begin += blank
                    if begin == len(chunk):
                        break
                    sink, size = pieces.new(suffix, line, line - 1 - blanks).open("wb"), 0
                end = chunk.find(b"\n", begin + max(0, PIECE - 1 - size)) + 1 or len(chunk)
                sink.write(memoryview(chunk)[begin:end])
                mark = len(_BOM) if line == 1 and chunk.startswith(_BOM, begin) else 0
                more, is_blank = _blank_lines(chunk, begin + mark, end, is_blank)
                blanks += more
                line += chunk.count(b"\n", begin, end)
                size += end - begin
                if size >= PIECE and chunk[end - 1] == 0x0A:
                    sink.close()
                    sink = None
                begin = end
    finally:
        if sink:
            sink.close()


def _blank_lines(chunk: bytes, begin: int, end: int, is_blank: bool) -> tuple[int, bool]:
    """How many blank lines end in a part of a chunk, and whether its last line is blank so far. `is_blank` says so of
    what came before of its first line."""
    first = chunk.find(b"\n", begin, end)
    if first < 0:
        return 0, is_blank and not chunk[begin:end].strip()
    count = int(is_blank and not chunk[begin:first].strip())
    count += sum(1 for _ in _BLANK_LINE.finditer(chunk, first, end))
    return count, not chunk[chunk.rfind(b"\n", begin, end) : end].strip()


def _cut_csv(stream: BinaryIO, pieces: Pieces) -> None:
    """Records are found by Python's own reader, as convert reads them: a line break in quotes ends none."""
    from stages.rows import LONGEST  # what convert takes; it imports Arrow, which looking does not need

    head = stream.read(len(_BOM))
    buffered = io.BufferedReader(_Rest(head.removeprefix(_BOM), stream), CHUNK)
    # Every byte is one character of Latin-1, and UTF-8 puts no comma, quote or line break into another character.
    text = io.TextIOWrapper(buffered, "latin-1", newline="")
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for one in text:
            taken.append(one)
            yield one

    csv.field_size_limit(LONGEST)
    reader = csv.reader(lines(), strict=True)
    sink: BinaryIO | None = None
    header, header_lines, rows, size = b"", 0, 0, 0
    try:
        for record in reader:
            raw, lines_taken = "".join(taken).encode("latin-1"), len(taken)
            taken.clear()
            if not record and sink is None:  # neither the file nor a piece begins with blank lines
                continue
            if not header_lines:
                header, header_lines = raw if raw.endswith((b"\n", b"\r")) else raw + b"\n", lines_taken
                continue
            if sink is None:
                first = reader.line_num - lines_taken + 1
                sink, size = pieces.new(".csv", first - header_lines, rows).open("wb"), len(header)
                sink.write(header)
            sink.write(raw)
            size += len(raw)
            rows += bool(record)
            pieces.took(bool(record))
            if size >= PIECE:
                sink.close()
                sink = None
            if pieces.full:
                break
    except csv.Error as error:
        raise pieces.wrong(f", line {reader.line_num}: is not CSV: {error}") from error
    finally:
        if sink:
            sink.close()


class _Rest(io.RawIOBase):
    """A stream whose first bytes were read already, for the text layers of `io`."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self.head, self.stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self.head = (self.head, b"") if self.head else (self.stream.read(len(buffer)), b"")
        buffer[: len(data)] = data
        return len(data)


def _cut_list(chunks: Iterator[bytes], pieces: Pieces) -> None:
    """`[row, row, ...]`: the rows' own text, as smaller lists."""
    sink: BinaryIO | None = None
    size = 0
    try:
        for number, row in enumerate(_elements(chunks, pieces), 1):
            if sink is None:
                sink, size = pieces.new(".json", number).open("wb"), 0
            data = row.encode()
            sink.write((b"[\n" if size == 0 else b",\n") + data)
            size += len(data) + 2
            pieces.took()
            if size >= PIECE:
                sink.write(b"\n]\n")
                sink.close()
                sink = None
            if pieces.full:
                break
        if sink:
            sink.write(b"\n]\n")
    finally:
        if sink:
            sink.close()


def _elements(chunks: Iterator[bytes], pieces: Pieces) -> Iterator[str]:
    """The text of each value of a JSON list, holding one value and a chunk in memory."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    scan = json.JSONDecoder().raw_decode
    text, place, done, number = "", 0, False, 1

    def more() -> None:
        nonlocal text, place, done
        fresh: list[str] = []
        # As much again as is there, so that one huge value is not scanned once a chunk.
        while not done and sum(map(len, fresh)) <= len(text) - place:
            chunk = next(chunks, b"")
            done = not chunk
            try:
                fresh.append(decode(chunk, done))
            except UnicodeDecodeError as error:
                raise pieces.wrong(f", near row {number}: is not UTF-8 text: {error}") from error
        text, place = text[place:] + "".join(fresh), 0

    def next_sign() -> str:
        nonlocal place
        while True:
            while place < len(text) and text[place] in " \t\r\n":
                place += 1
            if place < len(text) or done:
                return text[place : place + 1]
            more()

    def end_of_list() -> bool:
        nonlocal place
        if next_sign() != "]":
            return False
        place += 1
        if next_sign():
            raise pieces.wrong(": is not JSON: there is more after the end of the list")
        return True

    next_sign()
    place += 1  # the opening bracket
    if end_of_list():
        return
    while True:
        next_sign()
        while True:
            try:
                end = scan(text, place)[1]
                if end < len(text) or done:  # a number may go on in the next chunk
                    break
            except (ValueError, RecursionError) as error:  # a number may have more digits than Python reads
                if done or _is_wrong(error, len(text)):
                    told = str(error).partition("; use sys.")[0]
                    raise pieces.wrong(f", row {number}: is not JSON: {told}") from error
            more()
        yield text[place:end]
        place = end
        if end_of_list():
            return
        if next_sign() != ",":
            raise pieces.wrong(f", after row {number}: is not JSON: expected a comma or the end of the list")
        place += 1
        number += 1


def _is_wrong(error: Exception, length: int) -> bool:
    """Whether more text could not mend it: a string without its end may, and so may anything at the very end."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return not error.msg.startswith("Unterminated string") and error.pos < length - 16
