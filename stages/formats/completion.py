"""Raw text: `{"text": "..."}`. No chat template; the whole text trains, and the tokenizer's end token closes it."""

from collections.abc import Mapping
from typing import Any

from stages.formats import Conversation, Format, Options, Turn, text_at


def convert(row: Mapping[str, Any], options: Options) -> Conversation:
    """One row to one conversation with a single turn of role `text`. Raises BadRow."""
    return Conversation([Turn("text", text_at(row, options.name("text")))])


FORMAT = Format(version=1, convert=convert, fields=frozenset({"text"}), templated=False)
