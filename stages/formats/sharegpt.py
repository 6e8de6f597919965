"""ShareGPT's format: what was said, by whom.

    {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}],
     "system": "Be kind.", "tools": "[...]"}

`function_call` turns hold a tool call as JSON, `observation` turns its result. Flags of turns and of ranges of
characters are those of `messages`.
"""

from collections.abc import Mapping
from typing import Any

from stages.formats import BadRow, Conversation, Format, Options, Row, Turn
from stages.formats.messages import COLUMNS, MESSAGE_FIELDS, asks, chats, offered, sides_of, turn, with_system
from stages.formats.messages import names as message_names
from stages.row_fields import decoded, list_at, verdict


def convert(row: Row, options: Options) -> Conversation:
    """One row to one conversation. Raises BadRow."""
    field = options.name("conversations")
    found = turns(list_at(row, field, as_text=True), field, options)
    return Conversation(with_system(row, found, options), offered(row, options))


def turns(said: list[Any], place: str, options: Options) -> list[Turn]:
    """What was said as turns. `place` is where it stands. Raises BadRow."""
    at = message_names(options)._replace(role=options.name("from"), content=options.name("value"))
    found: list[Turn] = []
    for one in said:
        try:
            found.append(turn(one, options, at))
        except BadRow as error:
            raise error.inside(f"{place}[{len(found)}]") from error
    return found


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with a list of `from` and `value` in one of the columns that public data has it in."""
    found = [column for column in COLUMNS if chats(decoded(row.get(column)), "from", "value")]
    if len(found) != 1 or verdict(row.get("kto_tag")) is not None:
        return None
    if sides_of(row) and asks(decoded(row[found[0]]), "from", "value"):
        return None
    return {} if found == ["conversations"] else {"conversations": found[0]}


FORMAT = Format(
    convert,
    version=4,
    fields=MESSAGE_FIELDS - {"role", "content"} | {"conversations", "from", "value", "system", "tools"},
    recognises=recognises,
)
