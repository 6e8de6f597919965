"""OpenAI's chat format: `{"messages": [{"role", "content", ...}], "tools": [...]}`.

A turn may also carry `reasoning_content`, `tool_calls`, `tool_call_id`, `name`, and its own training flag: `train`
(true or false) or, as OpenAI's fine-tuning files say it, `weight` (1 or 0). Content may be a list of parts: `text`,
`reasoning` (or `thinking`) and `tool_call` parts are read, others (pictures, sound) are not.
"""

import json
from collections.abc import Mapping
from typing import Any

from stages.formats import BadRow, Conversation, Format, Options, Turn, list_at, object_at, text_at
from stages.tables import TRAIN_NO, TRAIN_UNSET, TRAIN_YES


def convert(row: Mapping[str, Any], options: Options) -> Conversation:
    """One row to one conversation. Raises BadRow."""
    field = options.name("messages")
    turns = [turn(message, f"{field}[{i}]", options) for i, message in enumerate(list_at(row, field))]
    return Conversation(turns, tools(row.get(options.name("tools")), options.name("tools")))


def turn(message: Any, place: str, options: Options) -> Turn:
    """One message of the list. Raises BadRow."""
    message = object_at(message, place)
    role = options.role(message.get(options.name("role")), f"{place}.{options.name('role')}")
    calls = tool_calls(message.get(options.name("tool_calls")), f"{place}.{options.name('tool_calls')}")
    reasoning = text_at(message, options.name("reasoning_content"), f"{place}.", optional=True)
    field = options.name("content")
    content = message.get(field)
    if isinstance(content, list):
        said = parts(content, f"{place}.{field}")
        content = said["text"] or (None if said["tool_call"] or calls else "")
        reasoning += said["reasoning"]
        calls = (calls or []) + said["tool_call"] or None
    if content is None and calls is None:
        raise BadRow("missing field", f"{place}.{field} is missing: expected text, or tool_calls")
    if content is not None and not isinstance(content, str):
        raise BadRow("wrong type", f"{place}.{field} must be text or a list of text parts")
    return Turn(
        role,
        content,
        train=flag(message, place, options),
        reasoning=reasoning or None,
        tool_calls=calls,
        name=text_at(message, "name", f"{place}.", optional=True) or None,
        tool_call_id=text_at(message, "tool_call_id", f"{place}.", optional=True) or None,
    )


def parts(content: list[Any], place: str) -> dict[str, Any]:
    """Content parts put together by kind: text, reasoning, tool calls. Raises BadRow for pictures and the like."""
    found: dict[str, Any] = {"text": "", "reasoning": "", "tool_call": []}
    for number, part in enumerate(content):
        part = object_at(part, f"{place}[{number}]")
        kind = part.get("type", "text")
        if kind not in ("text", "reasoning", "thinking", "tool_call"):
            raise BadRow(
                "content that is not text", f"{place}[{number}].type is {kind!r}: expected text, reasoning or tool_call"
            )
        said = text_at(part, kind if kind in part else "value" if "value" in part else "text", f"{place}[{number}].")
        if kind == "tool_call":
            found[kind] += called(said, f"{place}[{number}]")
        else:
            found["text" if kind == "text" else "reasoning"] += said
    return found


def called(text: str, place: str) -> list[dict[str, Any]]:
    """Tool calls written as JSON text: one, or a list of them. Raises BadRow."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow("tool call is not JSON", f"{place} is not JSON: {error}") from error
    return tool_calls(value if isinstance(value, list) else [value], place) or []


def flag(message: Mapping[str, Any], place: str, options: Options) -> int:
    """The turn's own training flag as TRAIN_*. Raises BadRow."""
    for name in ("train", "weight"):
        value = message.get(options.name(name))
        if value is None:
            continue
        if value not in (0, 1):
            raise BadRow("wrong type", f"{place}.{options.name(name)} is {value!r}: expected true, false, 1 or 0")
        return TRAIN_YES if value else TRAIN_NO
    return TRAIN_UNSET


def tool_calls(value: Any, place: str) -> list[dict[str, Any]] | None:
    """Tool calls with `arguments` as an object, whichever way the row has them. None when there are none."""
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{place} must be a list of tool calls")
    return [tool_call(call, f"{place}[{i}]") for i, call in enumerate(value)]


def tool_call(value: Any, place: str) -> dict[str, Any]:
    """One call, `{"function": {"name", "arguments"}}` or without the envelope. Raises BadRow."""
    value = object_at(value, place)
    call = object_at(value.get("function", value), f"{place}.function")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise BadRow("tool call is not JSON", f"{place}.arguments is not JSON: {error}") from error
    object_at(arguments, f"{place}.arguments")
    function = {"name": text_at(call, "name", f"{place}."), "arguments": arguments}
    identity = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    return {**identity, "type": "function", "function": function}


def tools(value: Any, place: str) -> list[Any] | None:
    """The tools on offer: a list, or a list written as JSON text. Raises BadRow."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow("tools are not JSON", f"{place} is not JSON: {error}") from error
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{place} must be a list of tools")
    return [object_at(tool, f"{place}[{i}]") for i, tool in enumerate(value)]


FORMAT = Format(
    version=1,
    convert=convert,
    fields=frozenset(
        {"messages", "tools", "role", "content", "train", "weight", "reasoning_content", "tool_calls"},
    ),
)
