"""Dataset formats: one file each, and the file's name is the name in the recipe (`convert.format: alpaca`).

A format turns one row, as it stands in the user's file, into a `Conversation`. To add one, drop a file here with
`FORMAT = Format(version=1, convert=..., fields={...})`.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.errors import UserError
from stages.tables import TRAIN_UNSET

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


@dataclass(slots=True)
class Turn:
    """One message. `content` is None only where the turn has tool calls instead."""

    role: str
    """system, user, assistant or tool; `text` for raw text that no template touches."""
    content: str | None
    train: int = TRAIN_UNSET
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    """As OpenAI writes them, with `function.arguments` decoded to an object."""
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(slots=True)
class Conversation:
    """What every format makes: turns in order, and the tools the assistant may call."""

    turns: list[Turn]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Options:
    """What a recipe says about the rows of one source."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """The format's field name -> the name it has in these rows."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """A role's name in these rows -> system, user, assistant or tool."""

    def name(self, standard: str) -> str:
        """What these rows call the format's field `standard`."""
        return self.fields.get(standard, standard)

    def role(self, value: Any, place: str) -> str:
        """The standard role for a role name found at `place`. Raises BadRow."""
        found = self.roles.get(value) or ROLES.get(value) if isinstance(value, str) else None
        if found is None:
            known = ", ".join(sorted({*ROLES, *self.roles}))
            raise BadRow("unknown role", f"{place} is {value!r}: expected one of {known}; map others in convert.roles")
        return found


@dataclass(frozen=True)
class Format:
    """A dataset format. `version` is bumped when the same row gives another conversation."""

    version: int
    convert: Callable[[Mapping[str, Any], Options], Conversation]
    """One row to one conversation. Raises BadRow, naming the field."""
    fields: frozenset[str]
    """Names that `convert.fields` may rename."""
    templated: bool = True
    """False when the text goes to the model as it is, without a chat template."""


def names() -> list[str]:
    """The formats there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Format:
    """The format called `name`. Raises UserError with the choices; an error inside a format's file propagates."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no format {name!r}: expected one of {', '.join(names())}.{hint}")
    found = importlib.import_module(f"{__name__}.{name}").FORMAT
    assert isinstance(found, Format), f"stages/formats/{name}.py must define FORMAT"
    return found


def text_at(row: Mapping[str, Any], name: str, place: str = "", *, optional: bool = False) -> str:
    """The string field `name` of a row or turn; with `optional`, missing and null read as "". Raises BadRow."""
    value = row.get(name)
    if value is None:
        if optional:
            return ""
        have = ", ".join(map(str, row)) or "nothing"
        raise BadRow("missing field", f"{place}{name} is missing: expected text; the row has {have}")
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{place}{name} is {_kind(value)}: expected text")
    return value


def list_at(row: Mapping[str, Any], name: str) -> list[Any]:
    """The list field `name` of a row. Raises BadRow."""
    value = row.get(name)
    if value is None:
        raise BadRow(
            "missing field", f"{name} is missing: expected a list; the row has {', '.join(map(str, row)) or 'nothing'}"
        )
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{name} is {_kind(value)}: expected a list")
    if not value:
        raise BadRow("empty conversation", f"{name} is empty: expected at least one turn")
    return value


def object_at(value: Any, place: str) -> Mapping[str, Any]:
    """`value` when it is an object. Raises BadRow."""
    if not isinstance(value, Mapping):
        raise BadRow("wrong type", f"{place} is {_kind(value)}: expected an object")
    return value


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
