"""Recognised from the first rows of each shard, and said in `counts.json`.

Every format is asked whether it knows the rows. One answer is taken; none, or several, is an error that names the
candidates, so that nothing is guessed. Raw text (`completion`) counts only where no other format knows the rows,
because many data sets carry a rendered `text` beside the real columns.
"""

from collections.abc import Mapping, Sequence

from stages import formats
from stages.errors import UserError
from stages.formats import BadRow, Conversation, Format, Options, Row
from stages.row_fields import listed

SAMPLE = 100
"""Rows that are looked at."""

LAST = "completion"
"""The format that any row with a `text` has."""

MEANT = {
    ("messages",): "messages",
    ("conversations",): "sharegpt",
    ("instruction", "output"): "alpaca",
    ("chosen", "rejected"): "preference",
    ("completion", "label"): "unpaired_preference",
    ("prompt", "completion"): "prompt_completion",
    ("input_ids",): "pretokenized",
    ("text",): "completion",
}
"""The format that rows with some columns were meant to have, if none knows them."""

Recognised = tuple[str, tuple[tuple[str, str], ...]]


def recognise(rows: Sequence[Row], raw: bool = False) -> tuple[str, Mapping[str, str]]:
    """The one format of the rows, and the fields that have other names in them; `raw` text has no system prompt. Raises
    UserError."""
    found = [seen for row in rows[:SAMPLE] if (seen := candidates(row))]
    found = [seen for seen in found if {name for name, _ in seen} != {LAST}] or found
    if not found:
        have = listed(rows[0]) if rows else "nothing"
        raise UserError(f"no format knows these rows: they have {have}{_nearest(rows)}. {_MEND}")
    common = set.intersection(*found)
    if len(common) == 1:
        ((name, fields),) = common
        form = formats.find(name)
        if _leaves_out(form, rows[:SAMPLE]):
            told = f"these rows look like {name}, but {HISTORY} holds earlier questions and answers, which only"
            raise UserError(f"{told} alpaca and llamafactory read. {_MEND}")
        return name, {**({} if raw else _system(rows[:SAMPLE], form)), **dict(fields)}
    if common:
        several = " or ".join(sorted(_told(one) for one in common))
        raise UserError(f"these rows could be {several}. {_MEND}")
    one = found[0]
    other = next((seen for seen in found if not seen & one), found[-1])
    raise UserError(
        f"some rows look like {' or '.join(sorted(map(_told, one)))}, "
        f"others like {' or '.join(sorted(map(_told, other)))}. {_MEND}"
    )


_MEND = "Say which with convert.format (or convert.sources.<name>.format); docs/formats.md shows them all"


def _nearest(rows: Sequence[Row]) -> str:
    """What keeps the first row from being what its columns say that it is."""
    for columns, name in MEANT.items():
        if rows and rows[0].keys() >= set(columns):
            try:
                formats.reader(name, {}, {}, {}).convert(rows[0])
            except BadRow as error:
                return f". As {name}: {error}"
    return ""


def candidates(row: Row) -> set[Recognised]:
    """The formats that know a row, each with the fields that have other names in it."""
    found = {
        (name, tuple(sorted(fields.items())))
        for name in formats.names()
        if (fields := formats.find(name).recognises(row)) is not None
    }
    return {one for one in found if one[0] != LAST} or found


SYSTEM = "system_prompt"
"""What a column `system` is called otherwise."""


def _system(rows: Sequence[Row], form: Format) -> dict[str, str]:
    """Where the system prompt is, if not in a column `system`. Rows that are prompts keep all their other columns."""
    values = [row.get(SYSTEM) for row in rows]
    other = not any("system" in row for row in rows) and all(isinstance(value, str | None) for value in values)
    return {"system": SYSTEM} if other and any(values) and "system" in form.fields and form.kind != "prompt" else {}


HISTORY = "history"
"""The column in which a question has others before it."""


def _leaves_out(form: Format, rows: Sequence[Row]) -> bool:
    """Whether some rows have turns before their prompt that the format does not read."""
    asks = "prompt" in form.fields and form.kind != "prompt"
    return asks and any(isinstance(said := row.get(HISTORY), list) and said for row in rows)


def _told(one: Recognised) -> str:
    name, fields = one
    return f"{name} ({', '.join(f'{standard}: {given}' for standard, given in fields)})" if fields else name


def convert(row: Row, options: Options) -> Conversation:
    """Never called: `formats.reader` puts the recognised format in its place."""
    raise AssertionError("the rows' format is not known yet")


FORMAT = Format(convert)
