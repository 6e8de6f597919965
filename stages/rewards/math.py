"""1 where the completion's last expression equals the answer as mathematics, else 0: `1/2`, `0.5` and `\\frac12` alike.

Parsing and comparing are the math-verify library's. It looks for LaTeX between the signs that open and close it, as a
completion has them (`$…$`, `\\boxed{…}`), and an answer's column mostly does not: of a bare `2\\sqrt{3}` it finds 2. So
an answer is read as LaTeX unless it is in words, such as `18 dollars`.
"""

import re
from typing import Any

from stages.errors import UserError
from stages.rewards import Reward, Row
from stages.stage import StageConfig


class Options(StageConfig):
    """Where the answer stands."""

    field: str = "answer"
    """Column with the right answer, as LaTeX (with or without `$` around it) or as a plain expression."""


SIGNS = ("$", "\\(", "\\[", "\\boxed")
"""What LaTeX stands between."""
WORDS = re.compile(r"[A-Za-z]{2}|\*\*|:")
"""What no LaTeX without a backslash has: words, Python's power, a time of day."""


def _wanted(answer: str) -> list[Any]:
    """What an answer may be, parsed."""
    from math_verify import parse

    texts = [answer]
    if not any(sign in answer.replace("\\$", "") for sign in SIGNS):
        as_latex = "\\" in answer or not WORDS.search(answer)
        texts.insert(0 if as_latex else 1, f"${answer}$")
    return next((found for text in texts if (found := parse(text, parsing_timeout=None))), [])


def score(completion: str, row: Row, options: Options) -> float:
    """1.0 or 0.0. Raises UserError without the library."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError("the reward math needs math-verify: pip install 'regrow[math]'") from error
    # The time limit is the judge's: the library's own uses signals.
    given = parse(completion, parsing_timeout=None)
    return float(verify(_wanted(str(row[options.field])), given, timeout_seconds=None))


REWARD = Reward(2, score, Options, needs=lambda options: (options.field,))
