"""Two answers to one prompt, of which one was preferred.

    {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven.", "margin": 1.5}

Each is a text, a message or a list of messages. Without a prompt, it is what chosen and rejected have in common at
their beginning; lists may repeat the prompt. Texts of the form `Human: ... Assistant: ...` are read as dialogues. With
`options: {wording: text}` plain texts are raw text, without a chat template. `margin` is optional: how much better.
"""

import math
from collections.abc import Mapping

from stages.formats import BadRow, Conversation, Example, Format, Options, Row, Turn
from stages.formats.messages import MESSAGE_FIELDS, asks, offered, sides_of, with_system
from stages.row_fields import blank, decoded, elsewhere, shown
from stages.row_turns import ASKING, Wording, after_prompt, dialogue, prompt_of, said, whole_question


def convert(row: Row, options: Options) -> Example:
    """One row to the chosen and the rejected conversation. Raises BadRow."""
    names = options.name("chosen"), options.name("rejected")
    prompt_field = options.name("prompt")
    whole_question(row, options)
    asked = row.get(prompt_field)
    none = asked is None or (blank(asked) and options.own.wording == "chat" and _ask_themselves(row, names))
    prompt = [] if none else said(row, prompt_field, "user", options)
    answers = [said(row, name, "assistant", options) for name in names]
    if prompt:
        (prompt, answers[0]), (other, answers[1]) = map(after_prompt, [prompt] * 2, answers, names)
        if prompt != other:
            raise BadRow("two prompts", f"{names[0]} and {names[1]} do not begin alike: expected one prompt")
    if not prompt:
        answers = _opened(answers, names, prompt_field, row)
    if all(answers):
        common = _common(answers)
        prompt, answers = prompt + answers[0][:common], [answer[common:] for answer in answers]
    for name, answer in zip(names, answers, strict=True):
        if not answer:
            raise BadRow("no answer", f"{name} says nothing after the prompt: expected an answer")
        if answer[0].role in ASKING:
            told = f"{name} goes on with a turn of {answer[0].role} that the other does not have"
            raise BadRow("two prompts", f"{told}: expected two answers to one prompt")
    if answers[0] == answers[1]:
        raise BadRow("identical sides", f"{names[0]} and {names[1]} are the same: expected a preferred answer")
    tools = offered(row, options)
    begun = prompt_of(with_system(row, prompt, options))
    parts = [Conversation(begun + answer, tools) for answer in answers]
    return Example(parts, _margin(row, options.name("margin")))


def _ask_themselves(row: Row, names: tuple[str, str]) -> bool:
    """Whether both sides are texts that hold their prompt, beside which a CSV has a blank cell."""
    return all(isinstance(side := row.get(name), str) and dialogue(side) is not None for name in names)


def _opened(answers: list[list[Turn]], names: tuple[str, str], prompt: str, row: Row) -> list[list[Turn]]:
    """Answers that hold their prompt themselves, as turns. Raises BadRow when they are plain texts that hold none."""
    told, mend = f"{prompt} is missing", elsewhere(row, names)
    texts = [turns[0].content or "" for turns in answers]
    if any(len(turns) > 1 for turns in answers):
        return answers
    if answers[0][0].role == "text":
        alike = next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        cut = texts[0].rfind(" ", 0, alike)
        if cut <= 0:
            raise BadRow("missing field", f"{told}, and {' and '.join(names)} do not begin alike{mend}")
        return [[Turn("text", text[:cut]), Turn("text", text[cut:])] for text in texts]
    read = [dialogue(text) for text in texts]
    if read[0] is None or read[1] is None:
        raise BadRow("missing field", f"{told}: expected text or messages{mend}")
    return [turns for turns in read if turns]


def _common(answers: list[list[Turn]]) -> int:
    """How many turns two conversations have in common at their beginning; the last one is always an answer."""
    most = min(map(len, answers)) - 1
    return next((n for n in range(most) if answers[0][n] != answers[1][n]), most)


def _margin(row: Row, name: str) -> dict[str, float]:
    value = row.get(name)
    if value is None or value != value or blank(value):  # NaN, as tables of pandas have it where there is none
        return {}
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # also a text, as a CSV has it
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow("wrong type", f"{name} is {shown(value)}: expected a number")
    return {"margin": number}


PROMPTS = ("prompt", "question", "instruction", "input", "conversations")


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with `chosen` and `rejected` (or `..._response`), and a `prompt` or at most one other column that public
    data has it in, also `messages`, if these are a text or end where the assistant is to answer. An `input` beside
    another of them is half of the question."""
    if (sides := sides_of(row)) is None:
        return None
    found = [name for name in PROMPTS if name in row]
    if "prompt" in found:
        found = [name for name in found if name in ("prompt", "input")]
    elif asks(said := decoded(row.get("messages"))) or (isinstance(said, str) and said.strip()):
        found.append("messages")
    if len(found) > 1:
        return None
    called = {"prompt": (*found, "prompt")[0], "chosen": sides[0], "rejected": sides[1]}
    return {standard: name for standard, name in called.items() if standard != name}


FORMAT = Format(
    convert,
    version=4,
    fields=MESSAGE_FIELDS | {"prompt", "chosen", "rejected", "margin", "system", "tools", "from", "value"},
    options=Wording,
    kind="preference",
    recognises=recognises,
)
