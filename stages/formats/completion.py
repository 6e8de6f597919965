"""Raw text, as for pretraining. No chat template; the whole text trains, and the tokenizer's end token closes it.

{"text": "It was a dark and stormy night."}
"""

from collections.abc import Mapping

from stages.formats import Conversation, Format, Options, Row, Turn
from stages.row_fields import text_at


def convert(row: Row, options: Options) -> Conversation:
    """One row to one conversation with a single turn of role `text`. Raises BadRow."""
    return Conversation([Turn("text", text_at(row, options.name("text")))])


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with a `text`; `auto` asks this one last."""
    return {} if isinstance(row.get("text"), str) else None


FORMAT = Format(convert, version=1, fields=frozenset({"text"}), templated=False, recognises=recognises)
