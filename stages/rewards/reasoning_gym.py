"""What reasoning-gym's own scorer of a task gives, from 0 to 1. For rows that `fetch` made with that library.

Scorers may give a little for a wrong answer; `strict` counts only full marks.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.rewards import Reward, Row, answer_of
from stages.stage import StageConfig


class Options(StageConfig):
    """How strictly."""

    strict: bool = False
    """1 for full marks, 0 for everything else."""


def ready(options: Options, models: Mapping[str, Path]) -> None:
    """Import the library, which takes seconds that no completion should be charged. Raises UserError without it."""
    try:
        import reasoning_gym  # noqa: F401
    except ImportError as error:
        raise UserError("the reward reasoning_gym needs that package: pip install 'regrow[data]'") from error


@cache
def _scorer(task: str) -> Any:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def score(completion: str, row: Row, options: Options) -> float:
    """Between 0.0 and 1.0."""
    metadata = row["metadata"]
    assert isinstance(metadata, dict)
    entry = {"question": row.get("question", ""), "answer": row["answer"], "metadata": metadata}
    found = float(_scorer(str(metadata["source_dataset"]))(answer_of(completion, row).strip(), entry))
    return float(found >= 1.0) if options.strict else found


REWARD = Reward(2, score, Options, needs=lambda options: ("answer", "metadata"), ready=ready)
