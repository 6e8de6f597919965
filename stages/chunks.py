"""A conversation through a Jinja template, once, as pieces that know which string of the data they came from."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2

from stages import sandbox, traced
from stages.errors import UserError
from stages.formats import BadRow, Conversation, Runs, Turn
from stages.marks import NO_TURN
from stages.traced import TEMPLATE, Traced, Untraceable


class Calls(NamedTuple):
    """How tool calls are handed to a template: they differ in what they can take."""

    silence: Mapping[str, str | None]
    """What a turn without content says: nothing, `{"content": None}` or `{"content": ""}`."""
    as_text: bool
    """Whether arguments come as JSON text instead of an object."""


class Leaf(NamedTuple):
    """A string of the data that was handed to the template."""

    turn: int
    kind: str
    train: int | None = None
    """The leaf's own TRAIN_*, where parts of a turn differ; None for the turn's."""
    call: int | None = None
    """Which of the turn's tool calls it is of."""


CONTENT, REASONING, CALLS, NAMES, TOOLS = "content", "reasoning", "tool calls", "names", "tools"

Chunk = tuple[str, Leaf | None, bool]
"""A piece of the render, the leaf that it came from (None: the template), and whether that leaf was written before."""


def render_chunks(
    compiled: jinja2.Template,
    variables: Mapping[str, str],
    calls: Calls | None,
    conversation: Conversation,
    **more: bool,
) -> list[Chunk]:
    """The render as pieces in order. `variables` and `more` are what the template finds beside messages and tools.

    Raises BadRow when the template refuses the conversation or fails on it, UserError when it cannot be followed.
    """
    leaves: list[Leaf] = []
    messages = [
        _message(turn, number, calls or Calls({}, False), leaves) for number, turn in enumerate(conversation.turns)
    ]
    tools = _marked(conversation.tools, Leaf(NO_TURN, TOOLS), leaves) if conversation.tools else None
    sandbox.begin(compiled, len(leaves))
    context = {"add_generation_prompt": False, "documents": None, **variables, **more}
    try:
        text = compiled.render(messages=messages, tools=tools, **context)
    except sandbox.TooMuch as error:
        raise BadRow("too much for the chat template", f"the chat template {error}") from error
    except Untraceable as error:
        raise UserError(f"the chat template cannot be followed: {error}; name or write another one") from error
    except jinja2.TemplateError as error:
        raise BadRow("refused by the chat template", f"the chat template refuses it: {error.message}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise BadRow("refused by the chat template", f"the chat template fails on it: {error}") from error
    chunks: list[Chunk] = []
    seen: set[int] = set()
    at = 0
    for length, number in traced.runs_of(text):
        piece = str.__getitem__(text, slice(at, at + length))
        chunks.append((piece, None, False) if number == TEMPLATE else (piece, leaves[number], number in seen))
        seen.add(number)
        at += length
    return chunks


def _message(turn: Turn, number: int, calls: Calls, leaves: list[Leaf]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, **(calls.silence if turn.content is None else {})}
    if turn.content is not None:
        message["content"] = _text(turn.content, turn.runs, Leaf(number, CONTENT), leaves)
    if turn.reasoning is not None:
        # The names that templates read it by.
        message["reasoning_content"] = message["thinking"] = _text(
            turn.reasoning, turn.reasoning_runs, Leaf(number, REASONING), leaves
        )
    if turn.tool_calls is not None:
        message["tool_calls"] = [
            _tool_call(call, Leaf(number, CALLS, call=place), calls, leaves)
            for place, call in enumerate(turn.tool_calls)
        ]
    for name in ("name", "tool_call_id"):
        if (value := getattr(turn, name)) is not None:
            message[name] = _marked(value, Leaf(number, NAMES), leaves)
    return message


def _text(text: str, runs: Runs | None, leaf: Leaf, leaves: list[Leaf]) -> Any:
    """A text as one leaf, or as one for each part with a training flag of its own."""
    if not runs:
        return _marked(text, leaf, leaves)
    found, at = [], 0
    for end, train in runs:
        found.append((end - at, len(leaves)))
        leaves.append(leaf._replace(train=train))
        at = end
    return Traced(text, tuple(found))


def _tool_call(call: Mapping[str, Any], leaf: Leaf, calls: Calls, leaves: list[Leaf]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if calls.as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    marked = {
        "name": _marked(function["name"], leaf, leaves),
        "arguments": _marked(arguments, leaf, leaves),
    }
    identity = {"id": _marked(call["id"], Leaf(leaf.turn, NAMES), leaves)} if "id" in call else {}
    return {**identity, "type": "function", "function": marked}


def _marked(value: Any, leaf: Leaf, leaves: list[Leaf]) -> Any:
    """The value with each of its strings traced to a number of its own in `leaves`."""

    def number() -> int:
        leaves.append(leaf)
        return len(leaves) - 1

    return traced.mark(value, number)
