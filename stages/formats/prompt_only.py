"""Prompts without answers, for reinforcement learning. All other columns are kept for the reward functions.

    {"prompt": "What is 2 + 3?", "answer": "5", "level": 1}

The prompt is a text or a list of messages that ends where the assistant is to answer. With `options: {wording: text}`
a plain text goes to the model as it stands, without a chat template. `options: {keep_messages: true}` keeps the turns
beside the rendered prompt: training in an environment renders them again, with the environment's tools.
"""

from collections.abc import Mapping
from typing import Any

from stages.formats import BadRow, Conversation, Example, Format, Options, Row, Turn
from stages.formats.messages import MESSAGE_FIELDS, offered, with_system
from stages.row_turns import Wording, prompt_of, said


class PromptWording(Wording):
    """The same, and what is kept of a prompt."""

    keep_messages: bool = False
    """Keep the turns as messages too, under `prompt`: an environment asks for them."""


def convert(row: Row, options: Options) -> Example:
    """One row to a prompt, with the other columns in `extra`. Raises BadRow."""
    field = options.name("prompt")
    turns = with_system(row, said(row, field, "user", options), options)
    if turns[-1].role == "assistant":
        raise BadRow("answered already", f"{field} ends with the assistant's answer: expected a prompt without one")
    read = {field, options.name("system"), options.name("tools")}
    extra = {name: value for name, value in row.items() if name not in read}
    if options.own.keep_messages:
        if "prompt" in extra:
            raise BadRow(
                "two prompts",
                "has a column prompt beside the one that is read, where keep_messages puts the turns: remove it",
            )
        if any(turn.role == "text" for turn in turns):
            raise BadRow("no messages", f"{field} is raw text: keep_messages needs turns, so leave wording at chat")
        extra["prompt"] = [_message(turn) for turn in turns]
    return Example([Conversation(prompt_of(turns), offered(row, options))], extra)


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as OpenAI writes it."""
    said = {"reasoning_content": turn.reasoning, "tool_calls": turn.tool_calls, "name": turn.name}
    more = {name: value for name, value in {**said, "tool_call_id": turn.tool_call_id}.items() if value is not None}
    return {"role": turn.role, "content": turn.content or "", **more}


ANSWERED = (
    "completion",
    "completions",
    "response",
    "chosen",
    "rejected",
    "chosen_response",
    "messages",
    "conversations",
    "output",
)


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with a prompt, and no column in which other formats have an answer."""
    if not isinstance(row.get("prompt"), str | list) or any(row.get(name) is not None for name in ANSWERED):
        return None
    return {}


FORMAT = Format(
    convert,
    fields=MESSAGE_FIELDS | {"prompt", "system", "tools", "from", "value"},
    options=PromptWording,
    kind="prompt",
    recognises=recognises,
)
