"""Reading the fields of a row: the value of the kind a format needs, or a `BadRow` that says what stands there."""

import datetime
import json
from collections.abc import Collection
from contextlib import suppress
from decimal import Decimal
from typing import Any

from stages.formats import BadRow, Row


def text_at(row: Row, name: str, *, optional: bool = False) -> str:
    """The string field `name` of a row or turn; with `optional`, missing and null read as "". Raises BadRow."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        if optional:
            return ""
        raise BadRow("missing field", f"{name} is missing: expected text; the row has {listed(row)}")
    raise BadRow("wrong type", f"{name} is {kind_of(value)}: expected text")


def list_at(row: Row, name: str, *, as_text: bool = False) -> list[Any]:
    """The list field `name` of a row; with `as_text` also one that is written as JSON text, as a CSV has it. Raises
    BadRow."""
    value = row.get(name)
    if as_text and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json_at(value, "not JSON")
        except BadRow as error:
            raise error.inside(name) from error
    if isinstance(value, list):
        if value:
            return value
        raise BadRow("empty conversation", f"{name} is empty: expected at least one turn")
    if value is None:
        raise BadRow("missing field", f"{name} is missing: expected a list; the row has {listed(row)}")
    raise BadRow("wrong type", f"{name} is {kind_of(value)}: expected a list")


def object_at(value: Any) -> dict[str, Any]:
    """`value` when it is an object. Raises BadRow, to be told of its place by `inside`."""
    if isinstance(value, dict):
        return value
    raise BadRow("wrong type", f" is {kind_of(value)}: expected an object")


def decoded(value: Any) -> Any:
    """A list that is written as JSON text as that list, and every other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(BadRow):
            return json_at(value, "not JSON")
    return value


def json_at(text: str, reason: str) -> Any:
    """JSON text as the value it says. Raises BadRow, to be told of its place by `inside`."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BadRow(reason, f" is not JSON: {error}") from error


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def says(value: Any) -> bool:
    """Whether there is something in a column."""
    return bool(value) or value not in (None, "", [], {})


def blank(value: Any) -> bool:
    """Whether a value is null, or a text that says nothing: CSV has no other way to leave a cell out."""
    return value is None or (isinstance(value, str) and not value.strip())


def verdict(value: Any) -> bool | None:
    """True or false, 1 or 0, or these as text, as a CSV has them; None for what is neither. Beside missing ones, pandas
    has 1.0 and 0.0."""
    said = str(value).strip().lower() if isinstance(value, bool | int | float | str) else ""
    return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(said)


def listed(row: Row) -> str:
    """The row's columns, for messages."""
    return ", ".join(map(str, row)) or "nothing"


def elsewhere(row: Row, known: Collection[str]) -> str:
    """Where the prompt of a row may be that has none in its place, for messages: a column that is none of `known`."""
    others = [name for name in row if name not in known]
    return f". The row also has {', '.join(others)}: is it there? convert.fields: {{prompt: NAME}}" if others else ""


def as_text(value: Any) -> str | None:
    """What columns hold beside JSON's values, as text: times and decimals; None for what is neither."""
    if isinstance(value, Decimal):
        return f"{value:f}"  # `str` may give an exponent
    return str(value) if isinstance(value, datetime.date | datetime.time | datetime.timedelta) else None


def shown(value: Any) -> str:
    """A value for messages, cut to a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
