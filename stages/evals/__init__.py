"""Evaluations of our own, one a file: the file's name is the name in the recipe (`eval: exact_match`).

A file defines `EVAL = Eval(version, examples, score)`. It says what is asked and how an answer is scored; generating,
batching, intervals and the comparison of models are done for it. Tasks that lm-eval ships need no file here.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache

from stages.errors import UserError
from stages.identity import Json

Row = tuple[str, Mapping[str, Json]]
"""Where a row stands, such as `spelling_heldout/00000/rows.jsonl line 17`, for messages; and the row."""


@dataclass(frozen=True)
class Options:
    """What a task in the recipe says about its items and their scoring."""

    question: str = "question"
    """Field of a row that holds what is asked."""
    answer: str = "answer"
    """Field of a row that holds the target."""
    ignore_case: bool = False
    ignore_punctuation: bool = False

    @property
    def names_fields(self) -> bool:
        """Whether the task says which fields are meant. Nothing else may then be asked, or scored against, instead."""
        return (self.question, self.answer) != (Options.question, Options.answer)


@dataclass(frozen=True)
class Example:
    """One item: what the model is asked, and what a right answer is."""

    question: str
    target: str
    details: Mapping[str, Json] = field(default_factory=dict)
    """Whatever else the scorer needs."""


@dataclass(frozen=True)
class Eval:
    """One evaluation."""

    version: int
    """Bumped when the same answers would score otherwise, or other things are asked: it enters the key."""
    examples: Callable[[Iterable[Row], Options], Sequence[Example]]
    """The items of a source's rows. Raises UserError naming the row that does not fit."""
    score: Callable[[Example, str, Options], float]
    """An answer's score from 0 (wrong) to 1 (right)."""


@cache
def names() -> tuple[str, ...]:
    """The evaluations there are: the files in this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> Eval:
    """The evaluation called `name`. Raises UserError with the choices when there is none; import errors propagate."""
    if name not in names():
        near = get_close_matches(name, names(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"there is no eval {name!r}: {hint}The choices are {', '.join(names())}")
    found = importlib.import_module(f"{__name__}.{name}").EVAL
    assert isinstance(found, Eval), f"stages/evals/{name}.py must define EVAL = Eval(...)"
    return found
