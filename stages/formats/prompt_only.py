"""Prompts without answers, for reinforcement learning. All other columns are kept for the reward functions.

    {"prompt": "What is 2 + 3?", "answer": "5", "level": 1}

The prompt is a text or a list of messages that ends where the assistant is to answer. With `options: {wording: text}`
a plain text goes to the model as it stands, without a chat template.
"""

from collections.abc import Mapping

from stages.formats import BadRow, Conversation, Example, Format, Options, Row
from stages.formats.messages import MESSAGE_FIELDS, offered, with_system
from stages.row_turns import Wording, prompt_of, said


def convert(row: Row, options: Options) -> Example:
    """One row to a prompt, with the other columns in `extra`. Raises BadRow."""
    field = options.name("prompt")
    turns = with_system(row, said(row, field, "user", options), options)
    if turns[-1].role == "assistant":
        raise BadRow("answered already", f"{field} ends with the assistant's answer: expected a prompt without one")
    read = {field, options.name("system"), options.name("tools")}
    extra = {name: value for name, value in row.items() if name not in read}
    return Example([Conversation(prompt_of(turns), offered(row, options))], extra)


ANSWERED = ("completion", "completions", "response", "chosen", "rejected", "messages", "conversations", "output")


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with a prompt, and no column in which other formats have an answer."""
    if not isinstance(row.get("prompt"), str | list) or any(row.get(name) is not None for name in ANSWERED):
        return None
    return {}


FORMAT = Format(
    convert,
    fields=MESSAGE_FIELDS | {"prompt", "system", "tools", "from", "value"},
    options=Wording,
    kind="prompt",
    recognises=recognises,
)
