"""1 where the completion is the answer, else 0: spaces around and between words do not count, nor does the model's own
reasoning before it."""

from stages.rewards import Reward, Row, answer_of
from stages.stage import StageConfig


class Options(StageConfig):
    """What counts as equal."""

    field: str = "answer"
    """Column with the right answer."""
    ignore_case: bool = False
    """Whether capitals do not matter."""


def score(completion: str, row: Row, options: Options) -> float:
    """1.0 or 0.0."""
    given, wanted = (" ".join(str(text).split()) for text in (answer_of(completion, row), row[options.field]))
    if options.ignore_case:
        given, wanted = given.casefold(), wanted.casefold()
    return float(given == wanted)


REWARD = Reward(2, score, Options, needs=lambda options: (options.field,))
