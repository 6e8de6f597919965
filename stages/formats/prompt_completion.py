"""A prompt and its completion, each a text or a list of messages. The prompt never trains.

    {"prompt": "The sky is", "completion": " blue."}
    {"prompt": [{"role": "user", "content": "Hi."}], "completion": [{"role": "assistant", "content": "Hello."}]}

Plain texts are a user's and an assistant's turn; with `options: {wording: text}` they are raw text, without a chat
template, as TRL's standard format means them.
"""

from collections.abc import Mapping

from stages.formats import BadRow, Conversation, Format, Options, Row
from stages.formats.messages import MESSAGE_FIELDS, offered, with_system
from stages.row_fields import verdict
from stages.row_turns import Wording, after_prompt, prompt_of, said, whole_question


def convert(row: Row, options: Options) -> Conversation:
    """One row to one conversation. Raises BadRow."""
    field = options.name("completion")
    whole_question(row, options)
    asked, completion = said(row, options.name("prompt"), "user", options), said(row, field, "assistant", options)
    prompt, completion = after_prompt(asked, completion, field)
    if not completion:
        raise BadRow("no answer", f"{field} says nothing after the prompt: expected an answer")
    return Conversation(prompt_of(with_system(row, prompt, options)) + completion, offered(row, options))


ANSWERS = ("completion", "response")


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with a prompt and a completion (or response), and no label that judges it."""
    found = [name for name in ANSWERS if isinstance(row.get(name), str | list)]
    if not isinstance(row.get("prompt"), str | list) or len(found) != 1 or verdict(row.get("label")) is not None:
        return None
    return {} if found == ["completion"] else {"completion": found[0]}


FORMAT = Format(
    convert,
    version=3,
    fields=MESSAGE_FIELDS | {"prompt", "completion", "system", "tools", "from", "value"},
    options=Wording,
    recognises=recognises,
)
