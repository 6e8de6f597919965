"""1 up to so many characters, falling in a line to 0 at twice as many: against rambling."""

from pydantic import Field

from stages.rewards import Reward, Row
from stages.stage import StageConfig


class Options(StageConfig):
    """The length."""

    most: int = Field(ge=1)
    """Characters that cost nothing."""
    least: int = Field(default=0, ge=0)
    """Characters below which nothing is given."""


def score(completion: str, row: Row, options: Options) -> float:
    """Between 0.0 and 1.0."""
    size = len(completion.strip())
    if size < options.least:
        return 0.0
    return min(1.0, max(0.0, 2.0 - size / options.most))


REWARD = Reward(1, score, Options)
