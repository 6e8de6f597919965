"""Alpaca's format: `{"instruction", "input", "output"}`, optionally `system` and `history` ([[question, answer], ...]).

Instruction and input become one user turn, a line break between them.
"""

from collections.abc import Mapping
from typing import Any

from stages.formats import BadRow, Conversation, Format, Options, Turn, text_at


def convert(row: Mapping[str, Any], options: Options) -> Conversation:
    """One row to one conversation. Raises BadRow."""
    turns = []
    if system := text_at(row, options.name("system"), optional=True):
        turns.append(Turn("system", system))
    for number, pair in enumerate(row.get(options.name("history")) or []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            place = f"{options.name('history')}[{number}]"
            raise BadRow("wrong type", f"{place} must be a pair of texts: a question and its answer")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    question = [text_at(row, options.name("instruction")), text_at(row, options.name("input"), optional=True)]
    turns.append(Turn("user", "\n".join(text for text in question if text)))
    turns.append(Turn("assistant", text_at(row, options.name("output"))))
    return Conversation(turns)


FORMAT = Format(version=1, convert=convert, fields=frozenset({"instruction", "input", "output", "system", "history"}))
