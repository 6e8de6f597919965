"""A Python file of a user's own, named by its path in a recipe: a format, a reward, an environment.

It runs with all the user's rights, so only with `--allow-code` or `REGROW_ALLOW_CODE=1`. Its text enters the key, its
path does not; the text of a file that it would import does not either, so it finds none beside it.
"""

import linecache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from stages.errors import UserError
from stages.home import expanded

T = TypeVar("T")


def not_allowed(key: str) -> UserError:
    """What to raise when the recipe's `key` names such a file and none may run."""
    return UserError(
        f"{key} names a Python file: it runs with all your rights, so say that it may: "
        "`--allow-code` or REGROW_ALLOW_CODE=1"
    )


def read(path: str, key: str) -> str:
    """The file's text. Raises UserError when there is no such file."""
    try:
        return expanded(path, key).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read {path}: {error} (looked from {Path.cwd()})") from None


def load(code: str, what: str, declared: str, kind: type[T], expected: str) -> T:
    """Run a file's text, a user's `what`, and take what it calls `declared`. Raises UserError when it fails or has none
    of that `kind`; `expected` is how it is declared."""
    module, name = ModuleType(f"own_{what}"), file_name(what)
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        exec(compile(code, name, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        raise UserError(f"your {what} fails when it is loaded: {told(error, what)}") from error
    found = module.__dict__.get(declared)
    if not isinstance(found, kind):
        raise UserError(f"your {what} has no {declared}: expected {expected}")
    return found


def file_name(what: str) -> str:
    """What tracebacks call the file."""
    return f"<your {what}>"


def told(error: BaseException, what: str) -> str:
    """An error with its line in the user's file, and why a module was not found."""
    place, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == file_name(what):
            place = f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        place = f" (line {error.lineno})"
    if place and isinstance(error, ModuleNotFoundError):
        place += (
            ". Code of your own is one file, whose text enters the key, so it finds no file beside it: write what it "
            f"needs of {error.name} into it, or install that"
        )
    return f"{type(error).__name__}: {error.args[0] if isinstance(error, SyntaxError) else error}{place}"
