"""The tool calls of a turn, whichever way a row writes them: objects or JSON text, in OpenAI's envelope or without."""

from collections.abc import Mapping
from typing import Any

from stages.formats import BadRow
from stages.row_fields import json_at, kind_of, object_at, text_at

KEYS = frozenset({"name", "arguments", "parameters", "id", "type", "index", "function"})
"""What a call may hold besides its arguments, or have them in."""


def called(said: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """Tool calls in a field, as an object or JSON text: one, or a list of them. Raises BadRow."""
    value = said.get(field)
    if not isinstance(value, list | dict):
        text = text_at(said, field)
        try:
            value = json_at(text, "tool call is not JSON")
        except BadRow as error:
            raise error.inside(field) from error
    return tool_calls(value if isinstance(value, list) else [value], field)


def tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls with `arguments` as an object, whichever way the row has them. Raises BadRow."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{place} is {kind_of(value)}: expected a list of tool calls")
    found: list[dict[str, Any]] = []
    for call in value:
        try:
            found.append(_tool_call(call))
        except BadRow as error:
            raise error.inside(f"{place}[{len(found)}]") from error
    return found


def _tool_call(value: Any) -> dict[str, Any]:
    """One call, `{"function": {"name", "arguments"}}` or without the envelope; Llama 3.1 says `parameters`."""
    value = object_at(value)
    call = value if value.get("function") is None else value["function"]
    try:
        call = object_at(call)
    except BadRow as error:
        raise error.inside("function") from error
    arguments = call.get("arguments", call.get("parameters"))
    if arguments is None and (others := [key for key in call if key not in KEYS and call[key] is not None]):
        raise BadRow("missing field", f" has no arguments, but {', '.join(others)}: expected `arguments`")
    try:
        if isinstance(arguments, str):
            arguments = json_at(arguments or "{}", "tool call is not JSON")
        arguments = {} if arguments is None else object_at(arguments)
    except BadRow as error:
        raise error.inside("arguments") from error
    function = {"name": text_at(call, "name"), "arguments": arguments}
    identity = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    return {**identity, "type": "function", "function": function}


def said_once(calls: list[dict[str, Any]], others: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """Tool calls that a message may say in two places, once. Raises BadRow when they differ."""
    if calls and others and [call["function"] for call in calls] != [call["function"] for call in others]:
        raise BadRow("said twice", f"{place} has other tool calls than the message's own: expected one of them")
    return calls or others
