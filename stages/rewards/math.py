"""1 where the completion's last expression equals the answer as mathematics, else 0: `1/2`, `0.5` and `\\frac12` alike.
The model's own reasoning is not looked at.

Parsing and comparing are the math-verify library's. It looks for LaTeX between the signs that open and close it, as a
completion has them (`$…$`, `\\boxed{…}`), and an answer's column mostly does not: of a bare `2\\sqrt{3}` it finds 2. So
an answer is read as LaTeX unless it is in words, such as `18 dollars`. `1 000 000`, `2 1/2` and `1.5e-3` are numbers.

An answer in letters alone (`B`, `Paris`), a time or ratio (`10:30`, `3:4`) and several numbers (`1 2 3`) are texts: the
completion is right where it ends with that, or has it in its last box. Capitals do not matter.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.rewards import Reward, Row, answer_of
from stages.stage import StageConfig


class Options(StageConfig):
    """Where the answer stands."""

    field: str = "answer"
    """Column with the right answer, as LaTeX (with or without `$` around it) or as a plain expression."""


SIGNS = ("$", "\\(", "\\[", "\\boxed")
"""What LaTeX stands between."""
WORDS = re.compile(r"[A-Za-z]{2}|\*\*|:")
"""What no LaTeX without a backslash has: words, Python's power, a colon."""
GROUPED = re.compile(r"(?<![\w.,])[1-9]\d{0,2}(?:(?:[ \u00a0\u2009\u202f~]|\\[, ])\d{3})+(?!\d)")
"""Digits in groups of three."""
POWER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][+-]?\d{1,3}(?!\w)")
"""A number with its power of ten, as programs write it."""
MIXED = re.compile(r"(?<![\w.,^/{}])(\d{1,9}) +(\d{1,9}) */ *(\d{1,9})(?!\.?\d| */)")
"""A whole number and a fraction."""
LETTERS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
NUMBERS = re.compile(r"\d[: ]\d")
"""Several, which are no one expression."""
NAMED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
"""Words within LaTeX."""
BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
LAST = re.compile(r"(?:\$([^$]+)\$|\\\((.+?)\\\))\W*$")
"""LaTeX at the very end."""


def ready(options: Options, models: Mapping[str, Path]) -> None:
    """Import the library, which takes seconds that no completion should be charged. Raises UserError without it."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise UserError("the reward math needs math-verify: pip install 'regrow[math]'") from error


def _plain(text: str) -> str:
    """A text whose numbers the library reads as they are meant."""
    text = GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), text.replace("\\$", ""))
    text = POWER.sub(lambda found: f"{Decimal(found[0]):f}", text)
    return MIXED.sub(lambda found: f"{int(found[1]) * int(found[3]) + int(found[2])}/{found[3]}", text)


def _wanted(answer: str) -> list[Any]:
    """What an answer may be, parsed."""
    from math_verify import parse

    texts = [answer]
    if not any(sign in answer for sign in SIGNS):
        as_latex = "\\" in answer or not WORDS.search(answer)
        texts.insert(0 if as_latex else 1, f"${answer}$")
    return next((found for text in texts if (found := parse(text, parsing_timeout=None))), [])


def _said(text: str) -> str:
    """A text as texts are compared: no signs around it, and no capitals."""
    text = re.sub(r"\\[,;:! ]|~", " ", NAMED.sub(r"\1", text)).replace("$", " ")
    return re.sub(r"(?<=\d) ?: ?(?=\d)", ":", " ".join(text.split())).strip(" .,;!?()[]*#\"'`\\").casefold()


def _ends_with(completion: str, answer: str) -> bool:
    """Whether a completion's last box, or else its end, is a text."""
    while (unnamed := NAMED.sub(r"\1", completion)) != completion:
        completion = unnamed
    marked = [*BOXED.findall(completion)[-1:], *("".join(found) for found in LAST.findall(completion))]
    if marked:
        return _said(marked[0]) == answer
    return re.search(rf"(?:^|[\s(\[*\"'`]|(?<!\d):){re.escape(answer)}$", _said(completion)) is not None


def score(completion: str, row: Row, options: Options) -> float:
    """1.0 or 0.0."""
    from math_verify import parse, verify

    answer, completion = _plain(str(row[options.field])), _plain(answer_of(completion, row))
    text = _said(answer)
    if NUMBERS.search(text) and "\\" not in text:
        return float(_ends_with(completion, text))
    if LETTERS.fullmatch(text) and _ends_with(completion, text):
        return 1.0
    # The time limit is the judge's: the library's own uses signals.
    return float(verify(_wanted(answer), parse(completion, parsing_timeout=None), timeout_seconds=None))


REWARD = Reward(3, score, Options, needs=lambda options: (options.field,), ready=ready)
