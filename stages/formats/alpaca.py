"""Alpaca's format: an instruction, what it is about, and the answer.

    {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["Hi.", "Hello."]]}

Instruction and input become one user turn, a line break between them; `system` and `history` are optional. With
`options: {wording: alpaca}` they are put into Stanford's own words instead ("Below is an instruction ... ###
Response:"), which go to the model as they stand, without a chat template; a `system` takes the place of the first
sentence there.
"""

from collections.abc import Mapping
from typing import Literal

from stages.formats import BadRow, Conversation, Format, Options, Row, Turn
from stages.formats.messages import refuse_media
from stages.marks import TRAIN_NO, TRAIN_YES
from stages.row_fields import blank, kind_of, text_at
from stages.stage import StageConfig


class AlpacaOptions(StageConfig):
    """How instruction and input are put to the model."""

    wording: Literal["chat", "alpaca"] = "chat"
    """`chat` for the chat template's words, `alpaca` for Stanford's and no template."""
    between: str = "\n"
    """What stands between instruction and input in a user turn (`wording: chat`)."""


BELOW = "Below is an instruction that describes a task"
PREAMBLE = {
    True: f"{BELOW}, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    False: f"{BELOW}. Write a response that appropriately completes the request.",
}
"""Stanford's first sentence, with and without an input."""


def convert(row: Row, options: Options) -> Conversation:
    """One row to one conversation. Raises BadRow."""
    refuse_media(row)
    system = text_at(row, options.name("system"), optional=True)
    instruction = text_at(row, options.name("instruction"))
    given = text_at(row, options.name("input"), optional=True)
    output = text_at(row, options.name("output"))
    earlier = history(row, options.name("history"))
    if options.own.wording == "alpaca":
        if earlier:
            raise BadRow("wrong type", f"{options.name('history')} is not empty: `wording: alpaca` asks one question")
        asked = f"### Input:\n{given}\n\n" if given else ""
        prompt = f"{system or PREAMBLE[bool(given)]}\n\n### Instruction:\n{instruction}\n\n{asked}### Response:\n"
        return Conversation([Turn("text", prompt, TRAIN_NO), Turn("text", output, TRAIN_YES)])
    question = options.own.between.join(text for text in (instruction, given) if text)
    first = [Turn("system", system)] if system else []
    return Conversation([*first, *earlier, Turn("user", question), Turn("assistant", output)])


def history(row: Row, name: str) -> list[Turn]:
    """Earlier questions and answers. Raises BadRow."""
    pairs = row.get(name)
    if blank(pairs):
        return []
    if not isinstance(pairs, list):
        raise BadRow("wrong type", f"{name} is {kind_of(pairs)}: expected a list of pairs of texts")
    found = []
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("wrong type", f"{name}[{number}] must be a pair of texts: a question and its answer")
        found += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return found


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with an instruction and an answer, also as Dolly calls it (`response`). Of an input and Dolly's `context`
    only one may say something; `auto` tells which is read."""
    output = [name for name in ("output", "response") if isinstance(row.get(name), str)]
    given = [name for name in ("input", "context") if row.get(name) and isinstance(row[name], str)]
    if not isinstance(row.get("instruction"), str) or len(output) != 1 or len(given) > 1:
        return None
    return {} if output == ["output"] else {"output": output[0]}


FORMAT = Format(
    convert,
    version=4,
    fields=frozenset({"instruction", "input", "output", "system", "history"}),
    options=AlpacaOptions,
    templated=lambda options: options.wording == "chat",
    recognises=recognises,
)
