"""Exact match: an answer is right when it equals the target, white space at both ends aside.

The settings `ignore_case` and `ignore_punctuation` (ASCII punctuation) loosen it. NUL characters never count, because
the scorer in lm-eval, which must agree item for item, cannot see them at a text's end.
"""

import string
from collections.abc import Iterable, Sequence

from stages.errors import UserError
from stages.evals import Eval, Example, Options, Row

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str, options: Options) -> str:
    """The text as it is compared."""
    text = text.replace("\0", "")
    if options.ignore_case:
        text = text.lower()
    if options.ignore_punctuation:
        text = text.translate(_PUNCTUATION)
    return text.strip()


def examples(rows: Iterable[Row], options: Options) -> Sequence[Example]:
    """One item a row: its fields of question and target, or `messages` of one user turn and its answer.

    A number as a target is taken as its text; anything else that is no text is refused.
    """
    return [_example(row, options) for row in rows]


def _example(row: Row, options: Options) -> Example:
    messages = row[1].get("messages")
    if not options.names_fields and options.question not in row[1] and isinstance(messages, list):
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        if roles != ["user", "assistant"]:
            raise UserError(
                f"{row[0]}: exact match asks one question, so `messages` must be one user and one assistant turn, "
                f"and not {roles}. Name fields of the row with `question:` and `answer:` in the task"
            )
        question, answer = ((row[0], message) for message in messages)
        return Example(_text(question, "content", "question"), _text(answer, "content", "answer"))
    return Example(_text(row, options.question, "question"), _text(row, options.answer, "answer", numbers=True))


def _text(row: Row, name: str, setting: str, *, numbers: bool = False) -> str:
    place, values = row
    value = values.get(name)
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        found = f"holds a {type(value).__name__}" if name in values else f"has only {', '.join(values)}"
        raise UserError(
            f"{place}: exact match needs text in the field {name!r}, and the row {found}. "
            f"Name the right field with `{setting}:` in the task"
        )
    return value


def score(example: Example, answer: str, options: Options) -> float:
    """1.0 when the answer matches, else 0.0."""
    return float(normalise(answer, options) == normalise(example.target, options))


EVAL = Eval(version=2, examples=examples, score=score)
