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
from typing import Any

from stages import own_code
from stages.errors import UserError
from stages.formats import BadRow, Conversation, Example, Format, Options, Row, Runs, Turn
from stages.marks import ROLES, TRAIN_NO, TRAIN_UNSET, TRAIN_YES
from stages.row_fields import kind_of
from stages.row_tool_calls import tool_calls


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
        except (Exception, SystemExit) as error:  # whatever a user's code raises
            told = own_code.told(error, "format")
            raise BadRow("your format fails", f"your format fails on it: {told}") from error
        try:
            _check(made, form.ids)
        except _Wrong as error:
            raise BadRow("your format fails", f"your format gives {error}") from error
        return made

    return convert


class _Wrong(Exception):
    """What the stages after this one could not read: what it is, and what was expected."""


def _check(made: Any, ids: bool) -> None:
    """Raises _Wrong for what is no conversation or example. Flags that are true and false become those of TRAIN_*."""
    _must(isinstance(made, Conversation | Example), f"{made!r:.80}", "a Conversation or an Example")
    parts = [made] if isinstance(made, Conversation) else made.parts
    _must(isinstance(parts, list), f"an Example of {parts!r:.80}", "a list of Conversations")
    for part in parts:
        _must(isinstance(part, Conversation), f"an Example of {part!r:.80}", "a Conversation")
        _must(isinstance(part.turns, list), f"turns that are {kind_of(part.turns)}", "a list of Turns")
        _must(bool(part.turns), "a conversation without turns", "one at least")
        _must(part.tools is None or isinstance(part.tools, list), f"tools that are {kind_of(part.tools)}", "a list")
        _must(isinstance(part.between, str | None), f"a `between` that is {kind_of(part.between)}", "text")
        _check_ids(part, ids)
        for number, turn in enumerate(part.turns):
            try:
                _check_turn(turn, part.ids)
            except _Wrong as error:
                raise _Wrong(f"a wrong turn: turn {number}{error}") from error
    if isinstance(made, Example):
        _must(isinstance(made.extra, dict), f"an Example's extra that is {kind_of(made.extra)}", "an object")


def _must(holds: bool, given: str, expected: str) -> None:
    if not holds:
        raise _Wrong(f"{given}: expected {expected}")


def _check_ids(part: Conversation, ids: bool) -> None:
    if not ids:
        _must(part.ids is None, "ids", "none without `Format(..., ids=True)`")
        return
    numbers = isinstance(part.ids, list) and all(type(one) is int and one >= 0 for one in part.ids)
    _must(numbers, f"ids that are {part.ids!r:.80}", "a list of whole numbers")
    alone = len(part.turns) == 1 and isinstance(turn := part.turns[0], Turn) and turn.role == "text"
    _must(alone and turn.runs is not None, "other turns beside ids", "one of role text with runs")


def _check_turn(turn: Any, ids: list[int] | None) -> None:
    _must(isinstance(turn, Turn), f" is {turn!r:.80}", "a Turn")
    _must(turn.role in ROLES[1:], f"'s role is {turn.role!r:.80}", ", ".join(ROLES[1:]))  # the first is nobody's
    says = isinstance(turn.content, str) or (turn.content is None and bool(turn.tool_calls))
    _must(says, f"'s content is {kind_of(turn.content)}", "text, or tool_calls")
    for name in ("reasoning", "name", "tool_call_id"):
        _must(isinstance(value := getattr(turn, name), str | None), f"'s {name} is {kind_of(value)}", "text")
    turn.train = _flag(turn.train, "'s train")
    turn.runs = _flagged(turn.runs, "'s runs", len((turn.content or "") if ids is None else ids))
    turn.reasoning_runs = _flagged(turn.reasoning_runs, "'s reasoning_runs", len(turn.reasoning or ""))
    try:
        turn.tool_calls = tool_calls(turn.tool_calls, "tool_calls") or None
    except BadRow as error:
        raise _Wrong(f"'s {error}") from error


def _flag(value: Any, place: str) -> int:
    if isinstance(value, bool):  # as a number, True would mean that it does not train
        return TRAIN_YES if value else TRAIN_NO
    known = isinstance(value, int) and value in (TRAIN_UNSET, TRAIN_NO, TRAIN_YES)
    _must(known, f"{place} is {value!r:.80}", "True, False, TRAIN_YES, TRAIN_NO or TRAIN_UNSET")
    return int(value)


def _flagged(runs: Any, place: str, length: int) -> Runs | None:
    """The runs of something as long as `length`, which they must cover."""
    if runs is None:
        return None
    pairs = isinstance(runs, list) and all(isinstance(run, tuple | list) and len(run) == 2 for run in runs)
    ends = [end for end, _ in runs] if pairs else []
    fits = bool(ends) and all(type(end) is int and end >= 0 for end in ends) and ends == sorted(ends)
    expected = f"(end, train) pairs, the ends ascending and the last one {length}, which is as far as it goes"
    _must(fits and ends[-1] == length, f"{place} are {runs!r:.80}", expected)
    return [(end, _flag(train, f"{place} have a flag that")) for end, train in runs]


def convert(row: Row, options: Options) -> Conversation:
    """Never called: `formats.reader` puts the file's own function in its place."""
    raise AssertionError("the user's file is not loaded yet")


FORMAT = Format(convert, version=3)
