"""A format of one's own: `format: ./my_format.py`, a Python file like those of the formats here, with `FORMAT` in it.

It runs with all the user's rights, so only with `--allow-code` or `REGROW_ALLOW_CODE=1`. Its text enters the key, its
path does not::

    from stages.formats import Conversation, Format, Turn

    def convert(row, options):
        return Conversation([Turn("user", row["q"]), Turn("assistant", row["a"])])

    FORMAT = Format(convert)
"""

import linecache
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from stages.errors import UserError
from stages.formats import BadRow, Conversation, Example, Format, Options, Row

NAME = "<your format>"
"""What tracebacks call the file."""
NOT_ALLOWED = (
    "convert.format names a Python file: it runs with all your rights, so say that it may: "
    "`--allow-code` or REGROW_ALLOW_CODE=1"
)


def read(path: str) -> str:
    """The text of a user's own format. Raises UserError when there is no such file."""
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"format: cannot read {path}: {error} (looked from {Path.cwd()})") from None


def load(code: str) -> Format:
    """Run a file's text and take its FORMAT. Raises UserError when it fails or has none."""
    if not code:
        raise UserError("format: own needs a file: name its path, e.g. `format: ./my_format.py`")
    module = ModuleType("own_format")
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    try:
        exec(compile(code, NAME, "exec"), module.__dict__)
    except Exception as error:  # whatever a user's code raises
        raise UserError(f"your format fails when it is loaded: {_told(error)}") from error
    found = module.__dict__.get("FORMAT")
    if not isinstance(found, Format):
        raise UserError("your format has no FORMAT: expected `FORMAT = Format(convert)` from stages.formats")
    return replace(found, convert=_guarded(found))


def _guarded(form: Format) -> Callable[[Row, Options], Conversation | Example]:
    def convert(row: Row, options: Options) -> Conversation | Example:
        try:
            made = form.convert(row, options)
        except BadRow:
            raise
        except Exception as error:  # as above
            raise BadRow("your format fails", f"your format fails on it: {_told(error)}") from error
        if not isinstance(made, Conversation | Example):
            raise BadRow("your format fails", f"your format gives {made!r:.80}: expected a Conversation or an Example")
        return made

    return convert


def _told(error: Exception) -> str:
    """The error with its line in the user's file."""
    place, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == NAME:
            place = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        place = f" (line {error.lineno})"
    return f"{type(error).__name__}: {error.args[0] if isinstance(error, SyntaxError) else error}{place}"


def convert(row: Row, options: Options) -> Conversation:
    """Never called: `formats.reader` puts the file's own function in its place."""
    raise AssertionError("the user's file is not loaded yet")


FORMAT = Format(convert)
