"""Text in segments, each with a flag that says whether it trains. No chat template; nothing is added.

    {"segments": [{"text": "<s>Hi.\\n", "label": false}, {"text": "Hello.</s>", "label": true}]}

The special tokens written in it are the model's own: what the row says is exactly what the model sees.
"""

from collections.abc import Mapping

from stages.formats import BadRow, Conversation, Format, Options, Row, Turn
from stages.formats.messages import flag
from stages.marks import TRAIN_UNSET
from stages.row_fields import list_at, object_at, text_at


def convert(row: Row, options: Options) -> Conversation:
    """One row to one conversation with a turn of role `text` for each segment. Raises BadRow."""
    field, label = options.name("segments"), options.name("label")
    turns: list[Turn] = []
    for segment in list_at(row, field):
        try:
            segment = object_at(segment)
            train = flag(segment, (label,))
            if train == TRAIN_UNSET:
                raise BadRow("missing field", f"{label} is missing: expected true or false")
            turns.append(Turn("text", text_at(segment, options.name("text")), train))
        except BadRow as error:
            raise error.inside(f"{field}[{len(turns)}]") from error
    return Conversation(turns)


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with `segments` of `text` and `label`."""
    segments = row.get("segments")
    fits = isinstance(segments, list) and segments
    return {} if fits and all(isinstance(s, dict) and {"text", "label"} <= s.keys() for s in segments or ()) else None


FORMAT = Format(
    convert,
    fields=frozenset({"segments", "text", "label"}),
    templated=False,
    verbatim=True,
    recognises=recognises,
)
