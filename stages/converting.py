"""The work of convert: the rows of one shard become rendered conversations in an Arrow table.

Apart from `stages.convert`, so that `regrow plan` loads neither Arrow nor Jinja.
"""

import datetime
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stages import chat_template, filters, formats, own_code
from stages.columns import Columns
from stages.convert import ConvertPart
from stages.filters import LeftOut
from stages.formats import BadRow, Conversation, Example, Reader, auto
from stages.forms import Formed, Forms, Layout, laid_out
from stages.marks import TRAIN_NO
from stages.reward_models import SEPARATOR
from stages.rows import Place, Row, read_rows
from stages.sequences import Sequencer, Written
from stages.stage import Facts, UserError, Work
from stages.tables import BATCH_ROWS, CONVERSATIONS, CONVERSATIONS_OF_IDS, SPAN, Numbers, offsets
from stages.tokenizer_files import read_tokenizer

PLACES = 10
"""Bad rows listed by place, for each reason."""
BATCH_CHARACTERS = 1 << 26
"""Text in one record batch, after which it ends before it has `BATCH_ROWS` rows."""


_tokenizer = lru_cache(maxsize=1)(read_tokenizer)
"""One for all shards of a process: its vocabulary is megabytes of JSON."""


@lru_cache(maxsize=1)
def _forms(tokenizer: Path, memory: Path, template: str, today: datetime.date | None) -> Forms:
    """Likewise: the shapes of one shard are those of the next."""
    return Forms(chat_template.load(_tokenizer(tokenizer, memory), template, today))


def convert(config: ConvertPart, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Convert one shard. Raises UserError naming file and row at the first bad one, or drops and counts them."""
    if config.format == "own" and not work.runtime.allow_code:
        raise own_code.not_allowed("convert.format")
    source = json.loads((inputs["rows"] / "source.json").read_text("utf-8"))
    name = _name(source, work.where)
    first = source.get("first", 1)
    (path,) = inputs["rows"].glob("rows.*")
    rows = filters.filtered(read_rows(path, name, first), config.filter)
    seen = _sample(rows) if config.format == "auto" else []
    reader = _reader(config, name, seen)
    memory = work.runtime.cache / "tokenizers"
    tokenizer = _tokenizer(inputs["tokenizer"], memory)
    # Rows of raw text need no template, so a base model without one is asked for none. Any it were given would go with
    # it, and ask it in a way that it never learned.
    bare = config.options.get("wording") == "text" and config.template == "tokenizer" and tokenizer.template is None
    forms = _forms(inputs["tokenizer"], memory, config.template, config.date) if reader.templated and not bare else None
    template = forms.template if forms else None
    counts = _Counts(name, _inside(source), config.bad_rows, Columns(reader.named))
    schema = (CONVERSATIONS_OF_IDS if reader.ids else CONVERSATIONS).with_metadata(
        {
            "control": json.dumps(list(template.control if template else tokenizer.special), ensure_ascii=False),
            "trusted": "1" if config.trust_special_tokens or reader.verbatim else "0",
            "prompt": template.prompt if template else "",
        }
    )
    sequencer = Sequencer(reader, tokenizer, forms, config.reasoning, config.trust_special_tokens)
    with pa.OSFile(str(output / "conversations.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        batch: list[Written] = []
        size = 0
        for converted in _converted(chain(seen, rows), sequencer, counts):
            batch += converted
            size += sum([one.rendered.length for one in converted])
            if len(batch) >= BATCH_ROWS or size >= BATCH_CHARACTERS:
                writer.write_batch(_batch(batch, schema))
                batch, size = [], 0
                work.tell(counts.rows, unit="rows")
        if batch:
            writer.write_batch(_batch(batch, schema))
    if not counts.rows:
        raise UserError(f"{name}: there are no rows in it")
    document = {
        "source": source["source"],
        "split": source["split"],
        # Of no rows nobody can say what they are: another shard's may be of any kind and format.
        **({"kind": reader.kind, "format": reader.format} if counts.left else {}),
        "fields": dict(reader.fields),
        "own_ends": reader.verbatim or reader.ids,
        "first": source.get("rows_before", first - 1),
        **({"end_in_words": template.end_in_words} if template and template.end_in_words else {}),
        **counts.document(),
    }
    if template:  # what the trained model must be asked through: merge puts it into the model's folder
        (output / "chat_template.jinja").write_text(template.source, "utf-8")
    for separator in counts.separators:
        # Likewise, where a process reward model's answers are cut into steps. One that learned from raw text alone
        # cannot judge what is asked through a chat template.
        if separator is not None and counts.chats:
            (output / f"{SEPARATOR}.json").write_text(json.dumps(separator), "utf-8")
    told = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    # A column may be named with half a character.
    (output / "counts.json").write_bytes(told.encode("utf-8", "replace"))
    work.tell(counts.rows, counts.rows, "rows")
    facts = {"rows": counts.rows, "dropped": dict(counts.dropped), "unwritten": dict(counts.unwritten)}
    return {**facts, "formats": {reader.format: 1} if counts.left else {}}


def _name(source: Mapping[str, Any], where: Mapping[str, Any]) -> str:
    """What messages call the file that a shard came from."""
    name = where.get("name") or source["source"]
    if file := source.get("file"):
        name = where["files"][file - 1] if where.get("files") else f"{name}, file {file}"
    return "/".join(filter(None, (name, source.get("member"))))


def _inside(source: Mapping[str, Any]) -> str:
    """What goes before a place in the artifact, which must not depend on what the file is called."""
    file, member = source.get("file"), source.get("member")
    return (f"file {file}, " if file else "") + (f"{member}, " if member else "")


def _sample(rows: Iterable[tuple[Place, Row | BadRow | LeftOut]]) -> list[tuple[Place, Row | BadRow | LeftOut]]:
    """The first rows, until there are enough to recognise a format by that no filter leaves out: those that it does may
    be of another one."""
    seen: list[tuple[Place, Row | BadRow | LeftOut]] = []
    kept = 0
    for place, row in rows:
        seen.append((place, row))
        kept += not isinstance(row, LeftOut)
        if kept == auto.SAMPLE:
            break
    return seen


def _reader(config: ConvertPart, name: str, seen: Sequence[tuple[Place, Row | BadRow | LeftOut]]) -> Reader:
    """The format that reads a shard. Raises UserError when it is not recognised in the rows `seen`."""
    rows = [row for _, row in seen if isinstance(row, dict)]
    try:
        return formats.reader(config.format, config.fields, config.roles, config.options, code=config.code, rows=rows)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


class _Counts:
    """What happened to the rows of one shard."""

    def __init__(self, name: str, inside: str, bad_rows: str, columns: Columns) -> None:
        self.name = name
        self.inside = inside
        self.columns = columns
        self.bad_rows = bad_rows
        self.rows = 0
        self.turns_without_end = 0
        self.dropped: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        self.unwritten: Counter[str] = Counter()
        self.separators: list[str | None] = []
        """What closes the steps of stepwise rows: one, once there was such a row."""
        self.chats = False
        """Whether one of those went through the chat template."""

    @property
    def left(self) -> int:
        """Rows that were not dropped."""
        return self.rows - self.dropped.total()

    def bad(self, place: str, error: BadRow, hint: str) -> None:
        """Count a bad row, or stop there."""
        if self.bad_rows == "error":
            raise UserError(f"{self.name}, {place}: {error}{hint} (or set convert.bad_rows: drop)") from error
        self.dropped[error.reason] += 1
        places = self.places.setdefault(error.reason, [])
        if len(places) < PLACES:
            places.append(f"{self.inside}{place}")

    def solved(self, solution: Conversation) -> None:
        """Remember what closes a row's steps. Raises BadRow where other rows' are closed otherwise, and where its steps
        are not those that cutting the written solution gives (`stages.steps.cut`): the model that learns from them
        could not be told where a step ends."""
        separator = solution.between
        steps = [turn.content or "" for turn in solution.turns if turn.role == "text" and turn.train != TRAIN_NO]
        for number, step in enumerate(steps, 1):
            if not step.strip():
                raise BadRow("blank step", f"step {number} says nothing: take it out, and its label")
            followed = f"{step}{separator}" if number < len(steps) else step
            if separator and followed.find(separator) not in (-1, len(step)):
                how = "holds" if separator in step else "ends with the beginning of"
                mend = "set another options.separator, or " + ("split it" if separator in step else "take that off")
                raise BadRow("separator in a step", f"step {number} {how} {separator!r}, which closes steps: {mend}")
        if self.separators and self.separators != [separator]:
            other = self.separators[0]
            raise BadRow("other separator", f"closes its steps with {separator!r}, and others with {other!r}")
        self.separators = [separator]
        self.chats |= any(turn.role != "text" for turn in solution.turns)

    def document(self) -> dict[str, Any]:
        """The counts as they stand in `counts.json`."""
        return {
            "rows": self.rows,
            "dropped": dict(self.dropped),
            "places": self.places,
            "unwritten": dict(self.unwritten),
            "turns_without_end": self.turns_without_end,
            **({"absent": self.columns.absent} if self.columns.absent else {}),
            **({"unread": self.columns.unread} if self.columns.unread else {}),
            **({SEPARATOR: self.separators[0]} if self.separators else {}),
        }


def _converted(
    rows: Iterable[tuple[Place, Row | BadRow | LeftOut]], sequencer: Sequencer, counts: _Counts
) -> Iterator[list[Written]]:
    """The sequences of each row that can be converted."""
    convert, check, form = sequencer.reader.convert, sequencer.reader.check, sequencer.reader.format
    for number, (place, row) in enumerate(rows):
        counts.rows += 1
        if isinstance(row, LeftOut):
            counts.dropped["filtered"] += 1
            continue
        try:
            if isinstance(row, BadRow):
                raise row
            made = convert(watched := counts.columns.watched(row))
            check(row)
            counts.columns.saw(watched)
            found = sequencer.sequences(number, made)
            if sequencer.reader.kind == "stepwise" and isinstance(made, Example):
                for solution in made.parts:
                    counts.solved(solution)
        except BadRow as error:
            counts.bad(place, error, "" if isinstance(row, BadRow) else formats.hint(row, form))
            continue
        for one in found:
            if one.rendered.unwritten:
                counts.unwritten.update(one.rendered.unwritten)
        counts.turns_without_end += sum([sequencer.without_end(one.rendered) for one in found])
        yield found


def _batch(rows: list[Written], schema: pa.Schema) -> pa.RecordBatch:
    """Columns built whole: an Arrow value at a time would cost more than the render."""
    layouts: list[Layout] = []
    gaps: list[Numbers] = []
    pieces: list[bytes] = []
    contents: list[int] = []
    first = 0
    for rendered in (one.rendered for one in rows):
        if isinstance(rendered, Formed):
            layouts.append(rendered.form.layout)
            gaps.append(rendered.form.gaps + first)
            pieces += rendered.pieces
            contents += map(len, rendered.contents)
        else:
            layouts.append(laid_out(rendered.spans))
            pieces.append(rendered.text.encode())
        first += len(layouts[-1].lengths)
    lengths, turns, kinds = (np.concatenate(column) for column in zip(*layouts, strict=True))
    if gaps:
        lengths[np.concatenate(gaps)] = contents
    counts = np.array([len(layout.lengths) for layout in layouts])
    borders, through = offsets(counts), offsets(lengths)
    ends = through[1:] - np.repeat(through[borders[:-1]], counts)
    structs = pa.StructArray.from_arrays(
        [pa.array(column, field.type) for column, field in zip((ends, turns, kinds), SPAN, strict=True)],
        fields=list(SPAN),
    )
    if "ids" in schema.names:
        said = pa.array([one.ids for one in rows], schema.field("ids").type)
    else:
        said = pa.StringArray.from_buffers(len(rows), *_utf8(through[borders], pieces))
    return pa.RecordBatch.from_arrays(
        [
            pa.array([one.row for one in rows], pa.uint32()),
            pa.array([one.part for one in rows], pa.uint8()),
            said,
            pa.ListArray.from_arrays(pa.array(borders, pa.int32()), structs, type=schema.field("spans").type),
            pa.array([one.identity for one in rows], pa.binary(16)),
            pa.array([one.extra for one in rows], pa.string()),
        ],
        schema=schema,
    )


def _utf8(borders: Numbers, pieces: list[bytes]) -> tuple[pa.Buffer, pa.Buffer]:
    """The buffers of a column of texts that begin and end at `borders` of the pieces together."""
    _, ends = pa.array(borders, pa.int32()).buffers()  # refuses what has more bytes than Arrow can count
    return ends, pa.py_buffer(b"".join(pieces))
