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
from stages.generation import Turn
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

    question: str | Sequence[Turn]
    """A text, which is a user's turn; or the turns so far of a conversation."""
    target: str
    details: Mapping[str, Json] = field(default_factory=dict)
    """Whatever else the scorer needs."""

    @property
    def turns(self) -> list[Turn]:
        """What is asked, as a conversation."""
        return [{"role": "user", "content": self.question}] if isinstance(self.question, str) else [*self.question]


@dataclass(frozen=True)
class Eval:
    """One evaluation."""

    version: int
    """Bumped when the same answers would score otherwise, or other things are asked: it enters the key."""
    examples: Callable[[Iterable[Row], Options], Sequence[Example]]
    """The items of a source's rows. Raises UserError naming the row that does not fit."""
    score: Callable[[Example, str, Options], float]
    """An answer's score from 0 (wrong) to 1 (right)."""


def question(row: Row, options: Options) -> list[Turn]:
    """What a row asks: its field of the question, a text or a list of messages; or, where the task names no field, its
    `messages`, without the assistant's answer where they end with one. Raises UserError naming the row that has
    neither, or a conversation that does not end with a user's turn."""
    place, values = row
    name = options.question
    found = values.get(name, None if options.names_fields else values.get("messages"))
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    if not isinstance(found, list):
        has = f"holds a {type(found).__name__}" if name in values else f"has only {', '.join(values)}"
        raise UserError(
            f"{place}: a question is a text or a list of messages in the field {name!r}, and the row {has}. Name the "
            "right field with `question:` in the task"
        )
    turns = [_turn(place, message) for message in found]
    if turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] != "user":
        roles = [turn["role"] for turn in turns]
        raise UserError(f"{place}: the model answers a user's turn, and the messages before the answer are {roles}")
    return turns


def _turn(place: str, message: Json) -> Turn:
    told = message if isinstance(message, dict) else {}
    role, content = told.get("role"), told.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{place}: a message is {{role: text, content: text}}, and one here is {message!r:.200}")
    return {"role": role, "content": content}


def shown(turns: Sequence[Turn]) -> str:
    """A conversation as a person reads it: a lone question as it stands."""
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{t['role']}: {t['content']}" for t in turns)


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
