"""Rewards: what a completion is worth, one a file, named in a recipe by its file's name.

    train:
      objective: grpo
      objective_options:
        rewards:
          right: {reward: exact_match, weight: 1.0}
          short: {reward: length, weight: 0.1, options: {most: 200}}

A file declares `REWARD = Reward(version, score)`. It is given a completion's text and the other columns of its prompt's
row, and knows nothing of the model that trains. Scoring happens in processes of their own, with a time limit
(`stages.judge`). A path, `reward: ./mine.py`, is a file of the user's own with `REWARD` in it, and needs
`--allow-code`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stages import choices, own_code
from stages.choices import OWN
from stages.identity import Json
from stages.stage import StageConfig

__all__ = ["ANSWER", "NoOptions", "Reward", "RewardChoice", "answer_of", "find", "load", "model_of", "names"]

Row = Mapping[str, Json]

ANSWER = "without_reasoning"
"""Under which a row holds what the completion says after the model's own reasoning."""


class NoOptions(StageConfig):
    """A reward without settings."""


@dataclass(frozen=True)
class Reward:
    """One reward."""

    version: int
    """Bumped when a completion would be worth something else."""
    score: Callable[[str, Row, Any], float]
    """`score(completion, row, options)`: any number up to 1e15, either side of zero. `row` holds the prompt's other
    columns, under `rendered_prompt` the prompt as the model reads it, and under `without_reasoning` the completion
    without what stands before the last mark that closes the model's reasoning, such as `</think>`."""
    options: type[StageConfig] = NoOptions
    needs: Callable[[Any], tuple[str, ...]] = lambda options: ()
    """The columns that a prompt's row must have."""
    model: Callable[[Any], str] = lambda options: ""
    """Which of `fetch.reward_models` it asks, by name; empty for none."""
    ready: Callable[[Any, Mapping[str, Path]], None] = lambda options, models: None
    """Called once in every process that scores, before the first completion: `ready(options, models)`, with the folders
    of the models that the recipe's rewards ask."""


class RewardChoice(StageConfig):
    """One reward of a recipe."""

    reward: str
    """A file in `stages/rewards/`, or the path of one's own."""
    weight: float = 1.0
    """Its share in the sum of all rewards; negative for what is not wanted."""
    options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """The reward's own settings."""
    code: str = ""
    """The text of one's own file, read when the recipe is."""

    @model_validator(mode="before")
    @classmethod
    def _read_own(cls, values: Any) -> Any:
        """A path becomes the file's text, which enters the key in its place."""
        return choices.with_own_code(values, "reward", "reward")

    @field_validator("reward")
    @classmethod
    def _known(cls, name: str) -> str:
        if name != OWN:
            find(name)
        return name

    @field_validator("options")
    @classmethod
    def _fit(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("reward")
        if name is None or name == OWN:
            return given
        return choices.fitted(name, find(name).options, given)


def names() -> tuple[str, ...]:
    """The rewards there are."""
    return choices.names(__name__)


def find(name: str) -> Reward:
    """The reward of that name. Raises UserError listing the choices."""
    return choices.find(__name__, name, "reward", Reward)


def answer_of(completion: str, row: Row) -> str:
    """What a completion says after the model's own reasoning: all of it, where nobody has looked for that."""
    return str(row.get(ANSWER, completion))


def model_of(choice: RewardChoice) -> str:
    """Which of `fetch.reward_models` a recipe's reward asks; empty for none, and for one's own file, which may not be
    run yet."""
    if choice.reward == OWN:
        return ""
    reward, options = load(choice)
    return reward.model(options)


def load(choice: RewardChoice) -> tuple[Reward, StageConfig]:
    """A recipe's reward with its options; a user's own file is run, which must have been allowed by then.

    Raises UserError when that file fails or declares no REWARD.
    """
    if choice.reward != OWN:
        reward = find(choice.reward)
        return reward, reward.options.model_validate(choice.options)
    expected = "`REWARD = Reward(1, score)` from stages.rewards"
    found = own_code.load(choice.code, "reward", "REWARD", Reward, expected)
    return found, found.options.model_validate(choice.options)
