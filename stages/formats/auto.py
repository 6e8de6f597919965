"""Recognised from the first rows of each shard, and said in `counts.json`.

Every format is asked whether it knows the rows. One answer is taken; none, or several, is an error that names the
candidates, so that nothing is guessed. Raw text (`completion`) counts only where no other format knows the rows,
because many data sets carry a rendered `text` beside the real columns. A later row that would be read otherwise than
the first ones is a bad row, so that nothing of it is left out in silence.
"""

from collections.abc import Callable, Mapping, Sequence

from stages import formats
from stages.errors import UserError
from stages.formats import BadRow, Conversation, Format, Options, Row
from stages.row_fields import listed, says

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
        return name, {**({} if raw else _others(rows[:SAMPLE], form, dict(fields))), **dict(fields)}
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


OTHERS = {"system": "system_prompt", "input": "context"}
"""What columns are called otherwise."""


def _others(rows: Sequence[Row], form: Format, fields: Mapping[str, str]) -> dict[str, str]:
    """The columns that the format reads under their other name: the usual one says nothing, and the other one does, or
    is the only one that there is. Where there is neither, a question whose answer is a `response` is about a `context`,
    as in Dolly's data. Rows that are prompts keep all their other columns."""
    found: dict[str, str] = {}
    for standard, other in OTHERS.items():
        values = [row.get(other) for row in rows]
        if not _reads(form, standard) or not all(isinstance(value, str | None) for value in values):
            continue
        dolly = standard == "input" and fields.get("output") == "response"
        alone = not any(standard in row for row in rows) and (dolly or any(other in row for row in rows))
        if (any(values) or alone) and not any(says(row.get(standard)) for row in rows):
            found[standard] = other
    return found


def _reads(form: Format, field: str) -> bool:
    return field in form.fields and form.kind != "prompt"


HISTORY = "history"
"""The column in which a question has others before it."""


def _leaves_out(form: Format, rows: Sequence[Row]) -> bool:
    """Whether some rows have turns before their prompt that the format does not read."""
    return _reads(form, "prompt") and any(isinstance(said := row.get(HISTORY), list) and said for row in rows)


JUDGED = ("label", "kto_tag")
"""Columns that say whether an answer is a good one."""


def alike(rows: Sequence[Row], name: str, fields: Mapping[str, str]) -> Callable[[Row], None]:
    """A function that raises BadRow for a row of which the format would leave out what none of the first `rows` say,
    by which they were recognised: they would have been recognised otherwise."""
    form = formats.find(name)
    read = {fields.get(field, field) for field in form.fields}
    named = {column for pair in OTHERS.items() if _reads(form, pair[0]) for column in pair}
    late = {column for column in (*named, HISTORY, *JUDGED) if not any(says(row.get(column)) for row in rows[:SAMPLE])}
    unread = frozenset(late - read)

    def otherwise(row: Row, column: str) -> bool:
        if column in JUDGED:
            return name not in {one for one, _ in candidates(row)}
        return column in named or _leaves_out(form, [row])

    def check(row: Row) -> None:
        if unread.isdisjoint(row):
            return
        for column in sorted(unread & row.keys()):
            if says(row[column]) and otherwise(row, column):
                told = f"{column} says something, which it did not in the first {SAMPLE} rows"
                mend = "set convert.format and convert.fields, or take the column out"
                raise BadRow("read otherwise", f"{told}, and {name} does not read it: {mend}")

    return check


def _told(one: Recognised) -> str:
    name, fields = one
    return f"{name} ({', '.join(f'{standard}: {given}' for standard, given in fields)})" if fields else name


def convert(row: Row, options: Options) -> Conversation:
    """Never called: `formats.reader` puts the recognised format in its place, if there are rows."""
    raise AssertionError("the rows' format is not known yet")


FORMAT = Format(convert, version=2, templated=False)  # no rows, no turns
