"""Any columns, put onto roles by the recipe: no code needed.

    convert:
      format: fields
      options:
        turns:
          - {role: system, text: "You answer for {shop[name]}.", optional: true}
          - {role: user, text: ["{question}\\n\\n{context}", "{question}"]}
          - {role: assistant, text: "{answer}", reasoning: "{thoughts}"}

    {"shop": {"name": "Leaf & Co"}, "question": "Open on Sunday?", "context": "", "answer": "No.", "thoughts": ""}

`{column}` stands for what the column holds, `{a[b]}` and `{a[0]}` for what is inside it, `{{` and `}}` for braces. Of
several texts the first is taken whose columns all hold something; without any, an `optional` turn is left out and
another is a bad row. Null, NaN, and empty texts, lists and objects are nothing. Turns of role `text` are raw text,
without a chat template. A `tools` column is offered as tools.
"""

import json
import math
import re
import string
from functools import cache
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from stages.formats import BadRow, Conversation, Format, Options, Row, Turn
from stages.formats.messages import offered
from stages.marks import TRAIN_NO, TRAIN_UNSET, TRAIN_YES
from stages.row_fields import as_text, kind_of, listed
from stages.stage import StageConfig

Path = tuple[str | int, ...]
Pieces = tuple[tuple[str, Path | None], ...]
"""(literal text, the column after it) from left to right."""


class FieldsTurn(StageConfig):
    """One turn, made of columns."""

    role: Literal["system", "user", "assistant", "tool", "text"]
    """Who says it; `text` is raw text."""
    text: str | list[str] = Field(min_length=1)
    """What is said, with columns in braces. Of several, the first whose columns all hold something."""
    reasoning: str = ""
    """The assistant's reasoning, in the same way; left out where its columns hold nothing."""
    optional: bool = False
    """Whether the turn is left out where its columns hold nothing, instead of the row being a bad one."""
    train: bool | None = None
    """Whether it trains; by default `pack.train_on` decides."""

    @field_validator("text", "reasoning")
    @classmethod
    def _parses(cls, value: str | list[str]) -> str | list[str]:
        for text in [value] if isinstance(value, str) else value:
            pieces(text)
        return value

    @model_validator(mode="after")
    def _reasons(self) -> "FieldsTurn":
        if self.reasoning and self.role != "assistant":
            raise ValueError(f"reasoning is the assistant's, not of a turn of role {self.role}")
        return self


class FieldsOptions(StageConfig):
    """How columns become turns."""

    turns: list[FieldsTurn] = Field(min_length=1)
    """The turns in order."""

    @model_validator(mode="after")
    def _one_sort(self) -> "FieldsOptions":
        if len({turn.role == "text" for turn in self.turns}) > 1:
            raise ValueError("turns of role text are raw text and stand with no other role")
        return self


_PLACE = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")


@cache
def pieces(text: str) -> Pieces:
    """A text with columns in braces, taken apart. Raises ValueError."""
    found: list[tuple[str, Path | None]] = []
    for literal, name, layout, conversion in string.Formatter().parse(text):
        if name is None:
            found.append((literal, None))
            continue
        match = _PLACE.fullmatch(name)
        if not match or layout or conversion:
            raise ValueError(f"{text!r}: {{{name}}} is no column: expected {{column}} or {{column[key]}}")
        inner = re.findall(r"\[([^\[\]]+)\]", match[2])
        found.append((literal, (match[1], *(int(key) if key.isdigit() else key for key in inner))))
    return tuple(found)


_KINDS = {None: TRAIN_UNSET, False: TRAIN_NO, True: TRAIN_YES}


def convert(row: Row, options: Options) -> Conversation:
    """One row to one conversation. Raises BadRow."""
    turns = []
    for turn in options.own.turns:
        text = _first(row, [turn.text] if isinstance(turn.text, str) else turn.text)
        if text is not None:
            reasoning = _filled(row, pieces(turn.reasoning)) if turn.reasoning else None
            turns.append(Turn(turn.role, text, _KINDS[turn.train], reasoning or None))
        elif not turn.optional:
            wanted = turn.text if isinstance(turn.text, str) else turn.text[-1]
            raise BadRow(
                "missing field",
                f"the {turn.role}'s {wanted!r} has a column that holds nothing; the row has {listed(row)}",
            )
    if not turns:
        raise BadRow("empty conversation", "all of its columns hold nothing: expected at least one turn")
    return Conversation(turns, offered(row, options))


def _first(row: Row, texts: list[str]) -> str | None:
    return next((found for text in texts if (found := _filled(row, pieces(text))) is not None), None)


def _filled(row: Row, taken: Pieces) -> str | None:
    """The text with the columns in it; None where one of them holds nothing."""
    said = []
    for literal, path in taken:
        said.append(literal)
        if path is not None:
            value = _inside(row, path)
            if value is None or value in ("", [], {}) or (isinstance(value, float) and math.isnan(value)):
                return None
            said.append(_said(value, path))
    return "".join(said)


def _said(value: Any, path: Path) -> str:
    """What a column holds, as text. Raises BadRow."""

    def other(value: Any) -> str:
        if (text := as_text(value)) is not None:
            return text
        name = str(path[0]) + "".join(f"[{key}]" for key in path[1:])
        expected = "expected text, a number, true or false, a time, or lists and objects of these"
        raise BadRow("wrong type", f"{name} holds {kind_of(value)}: {expected}; name no such column in options.turns")

    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=other)
    return other(value)


def _inside(row: Row, path: Path) -> Any:
    value: Any = row
    for key in path:
        if isinstance(value, dict):
            value = value.get(str(key))
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return None
    return value


def _templated(options: FieldsOptions) -> bool:
    return options.turns[0].role != "text"


def _columns(options: FieldsOptions) -> set[str]:
    texts = [text for turn in options.turns for text in ([turn.text] if isinstance(turn.text, str) else turn.text)]
    texts += [turn.reasoning for turn in options.turns]
    return {str(path[0]) for text in texts for _, path in pieces(text) if path is not None}


FORMAT = Format(convert, options=FieldsOptions, templated=_templated, columns=_columns)
