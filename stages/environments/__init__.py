"""Environments: what a model acts on while it is trained, through tools that it calls; one a file, named in a recipe by
its file's name.

    train:
      objective: grpo
      objective_options:
        environment: {name: ./guessing.py, turns: 5}

An environment is a class, as TRL's `environment_factory` takes it. `reset(prompt, **row)` begins an episode with the
prompt's messages and the other columns of its row, and may return text that is added to the prompt. Every other public
method is a tool: the model sees its name, its annotated arguments and its docstring (Google's style), and reads what it
returns: a text as it is, anything else as JSON. `get_reward()`, if there is one, says what the episode was worth. One
object serves one episode at a time, many one after another.

A file declares `ENVIRONMENT = Environment(version, make)`. A path, `name: ./mine.py`, is a file of the user's own with
`ENVIRONMENT` in it, and needs `--allow-code`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from stages import choices, own_code
from stages.choices import OWN
from stages.errors import UserError
from stages.stage import StageConfig

__all__ = ["Environment", "EnvironmentChoice", "NoOptions", "find", "load", "names"]


class NoOptions(StageConfig):
    """An environment without settings."""


@dataclass(frozen=True)
class Environment:
    """One environment."""

    version: int
    """Bumped when the same calls would be answered otherwise."""
    make: Callable[[Any], type]
    """From its options to the class."""
    options: type[StageConfig] = NoOptions


class EnvironmentChoice(StageConfig):
    """The environment of a recipe."""

    name: str
    """A file in `stages/environments/`, or the path of one's own."""
    options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """The environment's own settings."""
    weight: float = 1.0
    """The share of its reward, if it has one, in the sum of all rewards."""
    turns: int = Field(default=8, ge=1)
    """How often the model may call tools in an episode: with several at once, that is one turn."""
    seconds: float = Field(default=30.0, gt=0)
    """Time limit of one call, in seconds."""
    code: str = ""
    """The text of one's own file, read when the recipe is."""

    @model_validator(mode="before")
    @classmethod
    def _read_own(cls, values: Any) -> Any:
        """A path becomes the file's text, which enters the key in its place."""
        return choices.with_own_code(values, "name", "environment")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name != OWN:
            find(name)
        return name

    @field_validator("options")
    @classmethod
    def _fit(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")
        if name is None or name == OWN:
            return given
        return choices.fitted(name, find(name).options, given)


def names() -> tuple[str, ...]:
    """The environments there are."""
    return choices.names(__name__)


def find(name: str) -> Environment:
    """The environment of that name. Raises UserError listing the choices."""
    return choices.find(__name__, name, "environment", Environment)


def load(choice: EnvironmentChoice) -> type:
    """The class that a recipe asks for; a user's own file is run, which must have been allowed by then.

    Raises UserError when that file fails, declares no ENVIRONMENT, or refuses its options.
    """
    if choice.name == OWN:
        expected = "`ENVIRONMENT = Environment(1, lambda options: MyClass)` from stages.environments"
        environment = own_code.load(choice.code, "environment", "ENVIRONMENT", Environment, expected)
    else:
        environment = find(choice.name)
    try:
        return environment.make(environment.options.model_validate(choice.options))
    except ValidationError as error:
        told = error.errors()[0]
        raise UserError(f"environment.options.{'.'.join(map(str, told['loc']))}: {told['msg']}") from None
