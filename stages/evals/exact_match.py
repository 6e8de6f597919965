"""Exact match: an answer is right when it equals the target, white space at both ends aside.

The settings `ignore_case` and `ignore_punctuation` (ASCII punctuation) loosen it. NUL characters never count, because
the scorer in lm-eval, which must agree item for item, cannot see them at a text's end.
"""

import string
from collections.abc import Iterable, Sequence

from stages.errors import UserError
from stages.evals import Eval, Example, Options, Row, question

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
    """One item a row: its question (`stages.evals.question`), and its field of the target; where the question is the
    row's `messages`, the assistant's answer at their end.

    A number as a target is taken as its text; anything else that is no text is refused.
    """
    return [Example(question(row, options), _target(row, options)) for row in rows]


def _target(row: Row, options: Options) -> str:
    place, values = row
    if not options.names_fields and options.question not in values:
        last = values["messages"][-1]
        if last["role"] != "assistant":
            raise UserError(
                f"{place}: exact match compares with the answer at the end of `messages`, and they end with "
                f"{last['role']!r}. Name fields of the row with `question:` and `answer:` in the task"
            )
        return str(last["content"])
    value = values.get(options.answer)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        found = f"holds a {type(value).__name__}" if options.answer in values else f"has only {', '.join(values)}"
        raise UserError(
            f"{place}: exact match needs text in the field {options.answer!r}, and the row {found}. Name the right "
            "field with `answer:` in the task"
        )
    return value


def score(example: Example, answer: str, options: Options) -> float:
    """1.0 when the answer matches, else 0.0."""
    return float(normalise(answer, options) == normalise(example.target, options))


EVAL = Eval(version=2, examples=examples, score=score)
