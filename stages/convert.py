"""convert: rows of any format become rendered conversations with the origin of every byte.

One shard in, `conversations.arrow` (see `stages.tables.CONVERSATIONS`) and `counts.json` out. Needs no torch and no
transformers: the chat template runs in our own sandbox (`stages.templates`), once per conversation.
"""

import datetime
import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import AfterValidator, Field, model_validator

from stages import chat_template, formats, rendering, templates
from stages.chat_template import Template
from stages.formats import BadRow, Conversation, Options
from stages.identity import Tree
from stages.rendering import Rendered, Span
from stages.rows import read_rows
from stages.stage import Facts, Part, Stage, StageConfig, UserError, Work
from stages.tables import (
    BATCH_ROWS,
    CONVERSATIONS,
    NO_TURN,
    ORIGIN_CONTENT,
    ORIGIN_END,
    ORIGIN_TEMPLATE,
    SPAN,
    kind_of,
)
from stages.tokenizer_files import Tokenizer, read_tokenizer

PLACES = 10
"""Bad rows listed by place, for each reason."""


def _known_format(name: str) -> str:
    formats.find(name)
    return name


def _known_template(name: str) -> str:
    if name != "tokenizer" and "{" not in name:
        templates.find(name)
    return name


FormatName = Annotated[str, AfterValidator(_known_format)]
TemplateName = Annotated[str, AfterValidator(_known_template)]
Role = Literal["system", "user", "assistant", "tool", "function_call"]


class ConvertPart(StageConfig):
    """How the rows of one source are read."""

    format: FormatName = "messages"
    """What the rows look like: alpaca, completion, messages or sharegpt."""
    template: TemplateName = "tokenizer"
    """The chat template: `tokenizer` for the model's own, a named one such as `chatml`, or Jinja text."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Field names that differ from the format's: `{messages: dialogue}`."""
    roles: dict[str, Role] = Field(default_factory=dict)
    """Role names that are not widely used: `{support_agent: assistant}`."""
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with a row that cannot be converted: stop at the first, or leave it out and count it."""
    date: datetime.date | None = None
    """The date that a chat template gets when it asks for today's."""

    @model_validator(mode="after")
    def _known_fields(self) -> "ConvertPart":
        known = formats.find(self.format).fields
        for field in self.fields:
            if field not in known:
                near = difflib.get_close_matches(field, known, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"fields: {self.format} has no {field!r}, only {', '.join(sorted(known))}.{hint}")
        return self


class ConvertOverride(StageConfig):
    """Settings of one source that differ from the section's."""

    format: FormatName | None = None
    """As `convert.format`."""
    template: TemplateName | None = None
    """As `convert.template`."""
    fields: dict[str, str] | None = None
    """As `convert.fields`; not inherited by a source with a format of its own."""
    roles: dict[str, Role] | None = None
    """As `convert.roles`."""
    bad_rows: Literal["error", "drop"] | None = None
    """As `convert.bad_rows`."""
    date: datetime.date | None = None
    """As `convert.date`."""


class ConvertConfig(ConvertPart):
    """How rows become conversations, for all sources and for single ones."""

    sources: dict[str, ConvertOverride] = Field(default_factory=dict)
    """Settings of single sources, by their name in `fetch.data`."""

    def of(self, source: str) -> ConvertPart:
        """The settings of one source."""
        override = self.sources.get(source, ConvertOverride())
        own = override.model_dump(exclude_none=True)
        inherited = self.model_dump(exclude={"sources"} | ({"fields"} if override.format else set()))
        return ConvertPart.model_validate({**inherited, **own})

    @model_validator(mode="after")
    def _sources_fit(self) -> "ConvertConfig":
        for source in self.sources:
            self.of(source)
        return self


def parts(config: ConvertConfig, inputs: Mapping[str, Tree]) -> Sequence[Part]:
    """One part a shard of `rows`, with the settings of its own source only."""
    return [
        Part(
            name=shard,
            config=config.of(shard.partition("/")[0]).model_dump(mode="json"),
            inputs={"rows": rows, "tokenizer": inputs["tokenizer"]},
        )
        for shard, rows in inputs["rows"].folders().items()
    ]


def plugins(config: ConvertPart) -> Mapping[str, int]:
    """The formats and named templates that a config uses, with their versions."""
    used = [config, *(config.of(name) for name in config.sources)] if isinstance(config, ConvertConfig) else [config]
    found = {f"format:{part.format}": formats.find(part.format).version for part in used}
    named = {part.template for part in used} & set(templates.names())
    return {**found, **{f"template:{name}": templates.find(name).version for name in sorted(named)}}


def run(config: ConvertPart, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Convert one shard. Raises UserError naming file and row at the first bad one, or drops and counts them."""
    source = json.loads((inputs["rows"] / "source.json").read_text("utf-8"))
    tokenizer = read_tokenizer(inputs["tokenizer"])
    template = (
        chat_template.load(tokenizer, config.template, config.date) if formats.find(config.format).templated else None
    )
    (path,) = inputs["rows"].glob("rows.*")
    name = "/".join(part for part in (work.where.get("name") or source["source"], source.get("member")) if part)
    counts = _Counts(name, config.bad_rows)
    control = list(template.control if template else tokenizer.special)
    schema = CONVERSATIONS.with_metadata({"control": json.dumps(control, ensure_ascii=False)})
    with pa.OSFile(str(output / "conversations.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        batch: list[tuple[int, Rendered, bytes]] = []
        for converted in _converted(path, source.get("first", 1), config, tokenizer, template, counts):
            batch.append(converted)
            if len(batch) == BATCH_ROWS:
                writer.write_batch(_batch(batch, schema))
                batch = []
                work.tell(counts.rows, unit="rows")
        if batch:
            writer.write_batch(_batch(batch, schema))
    if not counts.rows:
        raise UserError(f"{name}: there are no rows in it")
    document = {"source": source["source"], "split": source["split"], "kind": "conversation", **counts.document()}
    if template:  # what the trained model must be asked through: merge puts it into the model's folder
        (output / "chat_template.jinja").write_text(template.source, "utf-8")
    (output / "counts.json").write_text(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    work.tell(counts.rows, counts.rows, "rows")
    return {"rows": counts.rows, "dropped": dict(counts.dropped), "unwritten": dict(counts.unwritten)}


class _Counts:
    """What happened to the rows of one shard."""

    def __init__(self, name: str, bad_rows: str) -> None:
        self.name = name
        self.bad_rows = bad_rows
        self.rows = 0
        self.turns_without_end = 0
        self.dropped: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        self.unwritten: Counter[str] = Counter()

    def bad(self, place: str, error: BadRow, hint: str) -> None:
        """Count a bad row, or stop there."""
        if self.bad_rows == "error":
            raise UserError(f"{self.name}, {place}: {error}{hint} (or set convert.bad_rows: drop)") from error
        self.dropped[error.reason] += 1
        places = self.places.setdefault(error.reason, [])
        if len(places) < PLACES:
            places.append(f"{self.name}, {place}")

    def document(self) -> dict[str, Any]:
        """The counts as they stand in `counts.json`."""
        return {
            "rows": self.rows,
            "dropped": dict(self.dropped),
            "places": self.places,
            "unwritten": dict(self.unwritten),
            "turns_without_end": self.turns_without_end,
        }


def _converted(
    path: Path, first: int, config: ConvertPart, tokenizer: Tokenizer, template: Template | None, counts: _Counts
) -> Iterator[tuple[int, Rendered, bytes]]:
    """(row number, render, identity) of the rows that can be converted."""
    convert = formats.find(config.format).convert
    options = Options(config.fields, config.roles)
    for number, (place, row) in enumerate(read_rows(path, counts.name, first)):
        counts.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            conversation = convert(row, options)
            digest = identity(conversation)
            rendered = rendering.render(template, conversation) if template else plain(tokenizer, conversation)
        except BadRow as error:
            counts.bad(place, error, "" if isinstance(row, BadRow) else _hint(row, config, options))
            continue
        counts.unwritten.update(rendered.unwritten)
        counts.turns_without_end += _without_end(rendered.spans)
        yield number, rendered, digest


def _hint(row: Mapping[str, Any], config: ConvertPart, options: Options) -> str:
    """The other format that could read a row, if any."""
    for name in formats.names():
        if name != config.format:
            try:
                formats.find(name).convert(row, options)
            except BadRow:
                continue
            return f". It looks like {name}: set convert.format or convert.sources.<name>.format"
    return ""


def identity(conversation: Conversation) -> bytes:
    """16 bytes of sha256 over the conversation's normal form: the same for every format and template.

    Raises BadRow when a text holds half a surrogate pair, which no UTF-8 can say.
    """
    turns = [
        [turn.role, turn.content, turn.reasoning, turn.tool_calls, turn.name, turn.tool_call_id, turn.train]
        for turn in conversation.turns
    ]
    try:
        normal = json.dumps([turns, conversation.tools], ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError as error:
        raise BadRow("not Unicode", f"holds half a surrogate pair: {error}") from error
    return hashlib.sha256(normal).digest()[:16]


def plain(tokenizer: Tokenizer, conversation: Conversation) -> Rendered:
    """Raw text as it is, between the tokenizer's own begin token (if it adds one) and its end token (if it has one)."""
    turn = conversation.turns[0]
    assert turn.content is not None
    end = tokenizer.variables.get("eos_token", "")
    pieces = [
        (tokenizer.prefix, ORIGIN_TEMPLATE, NO_TURN),
        (turn.content, ORIGIN_CONTENT, 0),
        (end, ORIGIN_END, 0),
    ]
    return Rendered("".join(text for text, _, _ in pieces), rendering.spans(pieces, conversation.turns), [])


def _without_end(spans: list[Span]) -> int:
    """Turns that the model should write, but which nothing ends: it would not learn to stop there."""
    last = {span.turn: span.origin for span in spans if span.role in ("assistant", "text")}
    return sum(origin != ORIGIN_END for origin in last.values())


def _batch(rows: list[tuple[int, Rendered, bytes]], schema: pa.Schema) -> pa.RecordBatch:
    """Columns built whole: an Arrow struct a span at a time would cost more than the render."""
    spans = [span for _, rendered, _ in rows for span in rendered.spans]
    columns = [
        [span.end for span in spans],
        [span.turn for span in spans],
        [kind_of(span.origin, span.role, span.train) for span in spans],
    ]
    structs = pa.StructArray.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, SPAN, strict=True)], fields=list(SPAN)
    )
    offsets = [0, *accumulate(len(rendered.spans) for _, rendered, _ in rows)]
    return pa.RecordBatch.from_arrays(
        [
            pa.array([number for number, _, _ in rows], pa.uint32()),
            pa.array([0] * len(rows), pa.uint8()),
            pa.array([rendered.text for _, rendered, _ in rows], pa.string()),
            pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs, type=schema.field("spans").type),
            pa.array([digest for _, _, digest in rows], pa.binary(16)),
            pa.array([""] * len(rows), pa.string()),
        ],
        schema=schema,
    )


STAGE = Stage(
    name="convert",
    artifact="conversations",
    version=3,
    config=ConvertConfig,
    run=run,
    parts=parts,
    part=ConvertPart,
    plugins=plugins,
    libraries=("jinja2",),
)
