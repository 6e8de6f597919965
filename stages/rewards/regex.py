"""1 where a pattern is found in the completion, else 0: for formats that an answer must have."""

import re

from pydantic import field_validator

from stages.rewards import Reward, Row
from stages.stage import StageConfig


class Options(StageConfig):
    """The pattern."""

    pattern: str
    """A regular expression in Python's syntax; `.` matches line ends too."""
    whole: bool = False
    """Whether it must match the whole completion."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern


def score(completion: str, row: Row, options: Options) -> float:
    """1.0 or 0.0."""
    search = re.fullmatch if options.whole else re.search
    return float(search(options.pattern, completion, re.DOTALL) is not None)


REWARD = Reward(1, score, Options)
