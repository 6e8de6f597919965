"""A format of one's own: `format: ./my_format.py`, a Python file like those of the formats here, with `FORMAT` in it.

It runs with all the user's rights, so only with `--allow-code` or `REGROW_ALLOW_CODE=1`. Its text enters the key, its
path does not::

    from stages.formats import Conversation, Format, Turn

    def convert(row, options):
        return Conversation([Turn("user", row["q"]), Turn("assistant", row["a"])])

    FORMAT = Format(convert)
"""

from collections.abc import Callable
from dataclasses import replace

from stages import own_code
from stages.errors import UserError
from stages.formats import BadRow, Conversation, Example, Format, Options, Row
from stages.marks import ROLES
from stages.row_fields import kind_of


def read(path: str) -> str:
    """The text of a user's own format. Raises UserError when there is no such file."""
    return own_code.read(path, "format")


def load(code: str) -> Format:
    """Run a file's text and take its FORMAT. Raises UserError when it fails or has none."""
    if not code:
        raise UserError("format: own needs a file: name its path, e.g. `format: ./my_format.py`")
    found = own_code.load(code, "format", "FORMAT", Format, "`FORMAT = Format(convert)` from stages.formats")
    return replace(found, convert=_guarded(found))


def _guarded(form: Format) -> Callable[[Row, Options], Conversation | Example]:
    def convert(row: Row, options: Options) -> Conversation | Example:
        try:
            made = form.convert(row, options)
        except BadRow:
            raise
        except Exception as error:  # whatever a user's code raises
            told = own_code.told(error, "format")
            raise BadRow("your format fails", f"your format fails on it: {told}") from error
        if not isinstance(made, Conversation | Example):
            raise BadRow("your format fails", f"your format gives {made!r:.80}: expected a Conversation or an Example")
        _check(made)
        return made

    return convert


def _check(made: Conversation | Example) -> None:
    """Raises BadRow for what the stages after this one could not read."""
    for part in [made] if isinstance(made, Conversation) else made.parts:
        if not part.turns:
            raise BadRow("your format fails", "your format gives a conversation without turns")
        for number, turn in enumerate(part.turns):
            if turn.role not in ROLES[1:]:  # the first is nobody's
                told = f"turn {number}'s role is {turn.role!r:.80}: expected {', '.join(ROLES[1:])}"
                raise BadRow("your format fails", f"your format gives a wrong turn: {told}")
            if not (isinstance(turn.content, str) or (turn.content is None and turn.tool_calls)):
                told = f"turn {number}'s content is {kind_of(turn.content)}: expected text, or tool_calls"
                raise BadRow("your format fails", f"your format gives a wrong turn: {told}")


def convert(row: Row, options: Options) -> Conversation:
    """Never called: `formats.reader` puts the file's own function in its place."""
    raise AssertionError("the user's file is not loaded yet")


FORMAT = Format(convert, version=2)
