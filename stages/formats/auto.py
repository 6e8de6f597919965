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


def recognise(rows: Sequence[Row]) -> tuple[str, Mapping[str, str]]:
    """The one format of the rows, and the fields that have other names in them. Raises UserError."""
    found = [seen for row in rows[:SAMPLE] if (seen := candidates(row))]
    found = [seen for seen in found if {name for name, _ in seen} != {LAST}] or found
    if not found:
        have = listed(rows[0]) if rows else "nothing"
        raise UserError(f"no format knows these rows: they have {have}{_nearest(rows)}. {_MEND}")
    common = set.intersection(*found)
    if len(common) == 1:
        ((name, fields),) = common
        return name, dict(fields)
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


def _told(one: Recognised) -> str:
    name, fields = one
    return f"{name} ({', '.join(f'{standard}: {given}' for standard, given in fields)})" if fields else name


def convert(row: Row, options: Options) -> Conversation:
    """Never called: `formats.reader` puts the recognised format in its place."""
    raise AssertionError("the rows' format is not known yet")


FORMAT = Format(convert)
