"""Dataset formats: one file each, and the file's name is the name in the recipe (`convert.format: alpaca`).

A format turns one row, as it stands in the user's file, into a `Conversation`, or into an `Example` of several (a
preference has two). To add one, drop a file here with `FORMAT = Format(convert=..., fields=...)` and a section with a
sample row into `docs/formats.md`, which the tests read.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import ValidationError

from stages.errors import UserError
from stages.marks import TRAIN_UNSET
from stages.stage import StageConfig

Row = Mapping[str, Any]
"""One row as it stands in the file: JSON values by column."""

Kind = Literal["conversation", "preference", "unpaired_preference", "stepwise", "prompt"]
"""What a row is for. A run trains on rows of one kind."""

Runs = list[tuple[int, int]]
"""Training flags within a text: (end, TRAIN_*), the ends ascending and the last one the text's length, in characters
(in tokens where a conversation has `ids`)."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""Role names found in public data, and what they mean. A recipe adds its own with `convert.roles`."""


class BadRow(UserError):
    """A row that cannot become a conversation. `reason` is short and the same for every row of its kind."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def inside(self, place: str) -> "BadRow":
        """The same error, told of something inside `place`.

        Places are put together on the way out, so that rows without errors do not pay for them.
        """
        detail = str(self)
        return BadRow(self.reason, f"{place}{'' if detail.startswith(('[', ' ')) else '.'}{detail}")


Reasoning = Literal["keep", "drop", "last"]


@dataclass(slots=True)
class Turn:
    """One message. `content` is None only where the turn has tool calls instead."""

    role: str
    """system, user, assistant or tool; `text` for raw text that no template touches."""
    content: str | None
    train: int = TRAIN_UNSET
    """TRAIN_*; a format of one's own may also say True or False."""
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    """As OpenAI writes them, with `function.arguments` decoded to an object."""
    name: str | None = None
    tool_call_id: str | None = None
    runs: Runs | None = None
    """Parts of `content` that have training flags of their own."""
    reasoning_runs: Runs | None = None
    """The same for `reasoning`."""


@dataclass(slots=True)
class Conversation:
    """Turns in order, and the tools the assistant may call.

    Turns of role `text` are raw text. Where others come before them, they stand in the place of the assistant's answer.
    """

    turns: list[Turn]
    tools: list[Any] | None = None
    ids: list[int] | None = None
    """Token ids, for a format with `ids`: then the only turn is one of role `text`, empty, with `runs`."""
    between: str | None = None
    """What follows each turn of raw text. None: nothing but the tokenizer's end token after the last."""


@dataclass(slots=True)
class Example:
    """A row that is more than one conversation, or that says more than one."""

    parts: list[Conversation]
    """Sequences in order: for a preference the chosen one and the rejected one."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What training needs beside the text, as JSON values: labels, a margin, a reward function's columns."""


class NoOptions(StageConfig):
    """A format without options of its own."""


@dataclass(frozen=True)
class Options:
    """What a recipe says about the rows of one source."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """The format's field name -> the name it has in these rows."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """A role's name in these rows -> system, user, assistant or tool."""
    own: Any = field(default_factory=NoOptions)
    """The format's own options, an object of its `Format.options`."""

    def name(self, standard: str) -> str:
        """What these rows call the format's field `standard`."""
        return self.fields.get(standard, standard)

    def role(self, value: Any) -> str:
        """The standard role for a role's name. Raises BadRow, to be told of its place by `inside`."""
        if isinstance(value, str) and (found := self.roles.get(value) or ROLES.get(value)):
            return found
        known = ", ".join(sorted({*ROLES, *self.roles}))
        raise BadRow("unknown role", f" is {value!r:.80}: expected one of {known}; map others in convert.roles")


def _unrecognised(row: Row) -> Mapping[str, str] | None:
    return None


@dataclass(frozen=True)
class Format:
    """A dataset format."""

    convert: Callable[[Row, Options], Conversation | Example]
    """One row to what it means. Raises BadRow, naming the field, and nothing else, whatever JSON the row holds."""
    version: int = 1
    """Bumped when the same row gives another conversation."""
    fields: frozenset[str] = frozenset()
    """Names that `convert.fields` may rename."""
    options: type[StageConfig] = NoOptions
    """What `convert.options` may say."""
    kind: Kind | Callable[[Any], Kind] = "conversation"
    """What its rows are for; a function of its options where they decide."""
    templated: bool | Callable[[Any], bool] = True
    """Whether rows need a chat template; a function of its options where they decide."""
    verbatim: bool = False
    """The text has the model's own special tokens in it, and nothing is added to it: no begin and no end token."""
    ids: bool = False
    """Rows come as token ids."""
    columns: Callable[[Any], Collection[str]] = lambda options: ()
    """Columns of the rows that its options name."""
    recognises: Callable[[Row], Mapping[str, str] | None] = _unrecognised
    """For `format: auto`, and cheap: the `fields` under which the row looks like this format (none renamed: empty), or
    None when it does not."""


@dataclass(frozen=True)
class Reader:
    """A format as it reads one shard."""

    format: str
    """The format's name; for `auto` the one that was recognised."""
    kind: Kind
    templated: bool
    verbatim: bool
    ids: bool
    fields: Mapping[str, str]
    named: frozenset[str]
    """Columns, and fields of messages, that the recipe names: a row may lack one, but if all do, it is a slip."""
    convert: Callable[[Row], Conversation | Example]
    """One row to what it means. Raises BadRow."""
    check: Callable[[Row], None]
    """Raises BadRow for a row that says something which is not read, where `auto` did not know of it."""


@cache
def names() -> tuple[str, ...]:
    """The formats there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find(name: str) -> Format:
    """The format called `name`. Raises UserError with the choices; an error inside a format's file propagates."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no format {name!r}: expected one of {', '.join(names())}.{hint}")
    found = importlib.import_module(f"{__name__}.{name}").FORMAT
    assert isinstance(found, Format), f"stages/formats/{name}.py must define FORMAT"
    return found


def check_fields(name: str, fields: Mapping[str, str]) -> None:
    """Raises UserError when `convert.fields` renames what the format does not know."""
    if name != "own":  # whose file is not run before the user allows it
        form = find(name)
        for given in fields:
            if given not in form.fields:
                raise UserError(f"fields: {_unknown(name, given, form.fields)}")


def filled(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A format's options with the defaults filled in. Raises UserError for one that it does not know."""
    return dict(options) if name == "own" else _parsed(name, find(name), options).model_dump(mode="json")


def kind(name: str, options: Mapping[str, Any]) -> Kind | None:
    """What rows of the format are for; None where that takes a look at them."""
    return None if name in ("auto", "own") else _kind(find(name), _parsed(name, find(name), options))


def templated(name: str, options: Mapping[str, Any]) -> bool:
    """Whether rows of the format may need a chat template."""
    return name in ("auto", "own") or _templated(find(name), _parsed(name, find(name), options))


def versions(name: str) -> dict[str, int]:
    """The formats that may read the rows, with their versions: all of them for `auto`."""
    return {f"format:{one}": find(one).version for one in (names() if name == "auto" else (name,))}


def hint(row: Row, name: str) -> str:
    """For messages: the other formats that a row looks like, if any."""
    near = [one for one in names() if one != name and find(one).recognises(row) is not None]
    return f". It looks like {' or '.join(near)}: set convert.format or convert.sources.<name>.format" if near else ""


def reader(
    name: str,
    fields: Mapping[str, str],
    roles: Mapping[str, str],
    options: Mapping[str, Any],
    *,
    code: str = "",
    rows: Sequence[Row] = (),
) -> Reader:
    """The format `name` as a recipe sets it. `auto` looks at `rows`, the first of the shard, and of none makes a reader
    that is never asked; `own` runs `code`.

    Raises UserError when the rows are of no format or could be of several, and when the code is no format.
    """
    named = fields
    check: Callable[[Row], None] = _fits
    if name == "auto":
        from stages.formats import auto

        if rows:
            name, fields = auto.recognise(rows, options.get("wording") == "text")
            check = auto.alike(rows, name, fields)
    if name == "own":
        from stages.formats import own

        form = own.load(code)
    else:
        form = find(name)
    parsed = _parsed(name, form, options)
    convert, said = form.convert, Options(dict(fields), dict(roles), parsed)
    return Reader(
        name,
        _kind(form, parsed),
        _templated(form, parsed),
        form.verbatim,
        form.ids,
        dict(fields),
        frozenset({*named.values(), *form.columns(parsed)} - {""}),
        lambda row: convert(row, said),
        check,
    )


def _fits(row: Row) -> None:
    return None


def _kind(form: Format, options: StageConfig) -> Kind:
    return form.kind if isinstance(form.kind, str) else form.kind(options)


def _templated(form: Format, options: StageConfig) -> bool:
    return form.templated if isinstance(form.templated, bool) else form.templated(options)


def _parsed(name: str, form: Format, options: Mapping[str, Any]) -> StageConfig:
    try:
        return form.options.model_validate(dict(options))
    except ValidationError as error:
        told = error.errors()[0]
        place = ".".join(map(str, ("options", *told["loc"])))
        if told["type"] == "extra_forbidden" and len(told["loc"]) == 1:
            raise UserError(f"options: {_unknown(name, str(told['loc'][0]), form.options.model_fields)}") from None
        raise UserError(f"{place}: {told['msg'].removeprefix('Value error, ')}") from None


def _unknown(name: str, given: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(given, known, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    told = ": name the format" if name == "auto" else ""
    return f"{name} has no {given!r}, only {', '.join(sorted(known))}.{hint}" if known else f"{name} takes none{told}"
