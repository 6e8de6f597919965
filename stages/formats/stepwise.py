"""A problem solved in steps, each judged: for process reward models (Lightman et al. 2023, Uesato et al. 2022).

    {"prompt": "What is 2 + 3 * 4?", "completions": ["3 * 4 = 12.", "2 + 12 = 15."], "labels": [true, false]}

Each step is a turn of raw text after the prompt, closed by `options.separator`; its label is about its last token.
"""

from collections.abc import Mapping

from pydantic import Field

from stages.formats import BadRow, Conversation, Example, Format, Options, Row, Turn
from stages.formats.messages import MESSAGE_FIELDS, offered, with_system
from stages.row_fields import kind_of, list_at, shown
from stages.row_turns import Wording, prompt_of, said


class StepwiseOptions(Wording):
    """How prompt and steps are put to the model."""

    separator: str = Field(default="\n", min_length=1)
    """What closes each step."""


def convert(row: Row, options: Options) -> Example:
    """One row to the prompt and its steps, with their labels. Raises BadRow."""
    prompt = with_system(row, said(row, options.name("prompt"), "user", options), options)
    field, judged = options.name("completions"), options.name("labels")
    steps, labels = list_at(row, field), list_at(row, judged)
    for number, step in enumerate(steps):
        if not isinstance(step, str):
            raise BadRow("wrong type", f"{field}[{number}] is {kind_of(step)}: expected text")
    for number, label in enumerate(labels):
        if isinstance(label, float) or label not in (0, 1):
            raise BadRow("wrong type", f"{judged}[{number}] is {shown(label)}: expected true or false")
    if len(steps) != len(labels):
        raise BadRow("wrong length", f"{judged} has {len(labels)} labels: expected {len(steps)}, one a step")
    turns = prompt_of(prompt) + [Turn("text", step) for step in steps]
    between = options.own.separator
    return Example([Conversation(turns, offered(row, options), between=between)], {"labels": [*map(bool, labels)]})


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with lists of `completions` and `labels`."""
    return {} if all(isinstance(row.get(name), list) for name in ("completions", "labels")) else None


FORMAT = Format(
    convert,
    fields=MESSAGE_FIELDS | {"prompt", "completions", "labels", "system", "tools", "from", "value"},
    options=StepwiseOptions,
    kind="stepwise",
    recognises=recognises,
    version=2,
)
