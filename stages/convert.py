"""convert: rows of any format become rendered conversations with the origin of every byte.

One shard in, `conversations.arrow` (see `stages.tables.CONVERSATIONS`) and `counts.json` out. The chat template runs
in our own sandbox (`stages.templates`), once per conversation. Needs no torch, and transformers only for tokenizers
whose files do not say what ends a text.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from stages import filters, formats, templates
from stages.formats import own
from stages.identity import Tree
from stages.stage import Facts, Part, Stage, StageConfig, Work


def _with_files(values: Any) -> Any:
    """A recipe's settings with the text of the files that it names in their place: keys hold what files say."""
    if not isinstance(values, Mapping):
        return values
    read = dict(values)
    if isinstance(name := read.get("format"), str) and name.endswith(".py"):
        read |= {"format": "own", "code": own.read(name)}
    if isinstance(template := read.get("template"), str):
        read["template"] = templates.resolved(template)
    return read


def _known_format(name: str) -> str:
    formats.find(name)
    return name


def _parsed_filter(text: str) -> str:
    if text:
        filters.parse(text)
    return text


FormatName = Annotated[str, AfterValidator(_known_format)]
FilterText = Annotated[str, AfterValidator(_parsed_filter)]
Role = Literal["system", "user", "assistant", "tool", "function_call"]


class ConvertPart(StageConfig):
    """How the rows of one source are read."""

    format: FormatName = "auto"
    """What the rows look like: a format's name, `auto` to recognise it, or the path of a Python file of one's own."""
    template: str = "tokenizer"
    """The chat template: `tokenizer` for the model's own, a named one (`chatml`), Jinja text, or a `.jinja` file."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Field names that differ from the format's: `{messages: dialogue}`."""
    roles: dict[str, Role] = Field(default_factory=dict)
    """Role names that are not widely used: `{support_agent: assistant}`."""
    options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """What the format itself can be told, e.g. `{wording: text}`."""
    code: str = ""
    """The text of one's own format; filled in from the file that `format` names."""
    reasoning: formats.Reasoning = "keep"
    """The assistant's reasoning: keep it, drop it, or keep only that after the last question."""
    trust_special_tokens: bool = False
    """Whether special tokens that stand in the data become control tokens; otherwise they stay text."""
    filter: FilterText = ""
    """Which rows are kept, e.g. `lang == "en" and len(messages) > 1`; the language is in `stages.filters`."""
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with a row that cannot be converted: stop at the first, or leave it out and count it."""
    date: datetime.date | None = None
    """The date that a chat template gets when it asks for today's."""

    _files = model_validator(mode="before")(_with_files)

    @field_validator("options")
    @classmethod
    def _defaults(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return formats.filled(info.data["format"], options) if "format" in info.data else options

    @model_validator(mode="after")
    def _fits(self) -> Self:
        formats.check_fields(self.format, self.fields)
        if self.format == "own" and not self.code:
            raise ValueError("format: own needs a file: name its path, e.g. `format: ./my_format.py`")
        return self


class ConvertOverride(StageConfig):
    """Settings of one source that differ from the section's."""

    format: FormatName | None = None
    """As `convert.format`."""
    template: str | None = None
    """As `convert.template`."""
    fields: dict[str, str] | None = None
    """As `convert.fields`; not inherited by a source with a format of its own."""
    roles: dict[str, Role] | None = None
    """As `convert.roles`."""
    options: dict[str, Any] | None = None
    """As `convert.options`; not inherited by a source with a format of its own."""
    code: str | None = None
    """As `convert.code`."""
    reasoning: formats.Reasoning | None = None
    """As `convert.reasoning`."""
    trust_special_tokens: bool | None = None
    """As `convert.trust_special_tokens`."""
    filter: FilterText | None = None
    """As `convert.filter`."""
    bad_rows: Literal["error", "drop"] | None = None
    """As `convert.bad_rows`."""
    date: datetime.date | None = None
    """As `convert.date`."""

    _files = model_validator(mode="before")(_with_files)


class ConvertConfig(ConvertPart):
    """How rows become conversations, for all sources and for single ones."""

    sources: dict[str, ConvertOverride] = Field(default_factory=dict)
    """Settings of single sources, by their name in `fetch.data`."""

    def of(self, source: str) -> ConvertPart:
        """The settings of one source."""
        override = self.sources.get(source, ConvertOverride())
        given = override.model_dump(exclude_none=True)
        not_inherited = {"sources"} | ({"fields", "options", "code"} if override.format else set())
        return ConvertPart.model_validate({**self.model_dump(exclude=not_inherited), **given})

    @property
    def uses_code(self) -> bool:
        """Whether rows are read by a Python file of the user's."""
        return "own" in (self.format, *(source.format for source in self.sources.values()))

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
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
    found = {name: version for part in used for name, version in formats.versions(part.format).items()}
    named = {part.template for part in used} & set(templates.names())
    return {**found, **{f"template:{name}": templates.find(name).version for name in sorted(named)}}


def run(config: ConvertPart, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Convert one shard. Raises UserError naming file and row at the first bad one, or drops and counts them."""
    from stages.converting import convert

    return convert(config, inputs, output, work)


STAGE = Stage(
    name="convert",
    artifact="conversations",
    version=20,
    config=ConvertConfig,
    run=run,
    parts=parts,
    part=ConvertPart,
    plugins=plugins,
    without=("pandas",),
    libraries=("jinja2", "transformers"),
)
