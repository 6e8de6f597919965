"""Names of modules and weights as recipes write them: plain, as a glob, or as an expression after `re:`."""

import difflib
import fnmatch
import re
from collections.abc import Iterable

from stages.errors import UserError


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted name is meant.

    A plain pattern means every name that holds it as whole parts (`mlp`, `self_attn.q_proj`); a glob (`*.mlp.*`) or an
    expression (`re:.*layers\\.2[0-9]\\..*`) must fit all of it.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def refuse_broken(patterns: Iterable[str]) -> None:
    """Raise UserError for an expression that does not compile."""
    for pattern in patterns:
        try:
            matches(pattern, "")
        except re.error as error:
            raise UserError(f"{pattern!r} is no regular expression: {error}") from None


def nearest(pattern: str, names: Iterable[str]) -> str:
    """What to say of a pattern that matches nothing: the nearest part of a name, else the parts that there are."""
    parts = sorted({part for name in names for part in name.split(".") if part and not part.isdigit()})
    last = re.split(r"[.*:\\]+", pattern.strip(".*"))[-1] or pattern
    near = difflib.get_close_matches(last, parts, 1)
    return f": did you mean {near[0]!r}?" if near else f"; names are made of {', '.join(parts)}"


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many others there are."""
    first, *others = sorted(names) or ["nothing"]
    return f"{first} and {len(others)} more" if others else first
