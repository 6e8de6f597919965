"""1 where the completion's last expression equals the answer as mathematics, else 0: `1/2`, `0.5` and `\\frac12` alike.

Parsing and comparing are the math-verify library's.
"""

from stages.errors import UserError
from stages.rewards import Reward, Row
from stages.stage import StageConfig


class Options(StageConfig):
    """Where the answer stands."""

    field: str = "answer"
    """Column with the right answer, as LaTeX or as a plain expression."""


def score(completion: str, row: Row, options: Options) -> float:
    """1.0 or 0.0. Raises UserError without the library."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError("the reward math needs math-verify: pip install 'regrow[math]'") from error
    # The time limit is the judge's: the library's own uses signals.
    wanted, given = (parse(text, parsing_timeout=None) for text in (str(row[options.field]), completion))
    return float(verify(wanted, given, timeout_seconds=None))


REWARD = Reward(1, score, Options, needs=lambda options: (options.field,))
