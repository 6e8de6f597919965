"""ShareGPT's format: `{"conversations": [{"from", "value"}], "system": "...", "tools": [...]}`.

`function_call` turns hold a tool call as JSON, `observation` turns its result.
"""

from collections.abc import Mapping
from typing import Any

from stages.formats import Conversation, Format, Options, Turn, list_at, object_at, text_at
from stages.formats.messages import called, flag, tools


def convert(row: Mapping[str, Any], options: Options) -> Conversation:
    """One row to one conversation. Raises BadRow."""
    field = options.name("conversations")
    turns = [_turn(said, f"{field}[{i}]", options) for i, said in enumerate(list_at(row, field))]
    if system := text_at(row, options.name("system"), optional=True):
        turns.insert(0, Turn("system", system))
    return Conversation(turns, tools(row.get(options.name("tools")), options.name("tools")))


def _turn(said: Any, place: str, options: Options) -> Turn:
    said = object_at(said, place)
    speaker = said.get(options.name("from"))
    value = text_at(said, options.name("value"), f"{place}.")
    train = flag(said, place, options)
    if options.roles.get(str(speaker), speaker) != "function_call":
        return Turn(options.role(speaker, f"{place}.{options.name('from')}"), value, train)
    return Turn("assistant", None, train, tool_calls=called(value, f"{place}.{options.name('value')}"))


FORMAT = Format(
    version=1,
    convert=convert,
    fields=frozenset({"conversations", "from", "value", "system", "tools", "train", "weight"}),
)
