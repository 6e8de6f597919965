"""A field of a row that holds what somebody says, as text or as messages, and what formats with a prompt make of it."""

import re
from typing import Any, Literal

from stages.formats import ROLES, BadRow, Options, Row, Turn, sharegpt
from stages.formats import messages as openai
from stages.marks import TRAIN_NO, TRAIN_UNSET
from stages.row_fields import kind_of, listed
from stages.stage import StageConfig


class Wording(StageConfig):
    """How plain texts are put to the model; lists of messages always go through the chat template."""

    wording: Literal["chat", "text"] = "chat"
    """`chat`: a plain prompt is a user's turn, a plain completion the assistant's. `text`: both are raw text, without a
    chat template."""


_LIST = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value)["']\s*:""")
_SPEAKS = re.compile(rf"""["'](?:role|from)["']\s*:\s*["'](?:{"|".join(ROLES)})["']""")
_SAYS = re.compile(r"""["'](?:content|value)["']\s*:""")
"""What a list of messages looks like that is written as text: as JSON, or as Python writes it into a CSV."""

ASKING = ("system", "user")
"""Who has the word before an answer."""


def said(row: Row, name: str, role: str, options: Options) -> list[Turn]:
    """The field `name` as turns: text that `role` says, one message, or a list of them. Raises BadRow."""
    value = row.get(name)
    if isinstance(value, str):
        if options.own.wording == "chat" and _LIST.match(value) and _SPEAKS.search(value) and _SAYS.search(value):
            told = f"{name} is a list of messages written as text, which would be learned as it stands"
            raise BadRow(
                "messages as text",
                f"{told}: expected the list itself, as JSON Lines and Parquet hold it. Where the text is meant, "
                "convert.format: fields takes it as it is",
            )
        return [Turn("text" if options.own.wording == "text" else role, value)]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        if not value:
            raise BadRow("empty conversation", f"{name} is empty: expected at least one turn")
        return messages(value, name, options)
    if value is None:
        raise BadRow("missing field", f"{name} is missing: expected text or messages; the row has {listed(row)}")
    raise BadRow("wrong type", f"{name} is {kind_of(value)}: expected text or messages")


def whole_question(row: Row, options: Options) -> None:
    """Raises BadRow where the prompt's column is only half of an instruction and what it is about. One that the recipe
    has another use for is no half."""
    name = options.name("prompt")
    other = {"instruction": "input", "input": "instruction"}.get(name)
    if not other or other in options.fields.values():
        return
    if isinstance(said := row.get(other), str) and said.strip():
        raise BadRow(
            "half a question",
            f"{other} says something besides {name}, which alone would be the prompt: expected one column. Choose "
            "convert.format: llamafactory, which reads both, or put them into one",
        )


def messages(value: list[Any], place: str, options: Options) -> list[Turn]:
    """Messages in OpenAI's or ShareGPT's form as turns. `place` is where they stand. Raises BadRow."""
    first = value[0]
    speaks = isinstance(first, dict) and options.name("from") in first and options.name("role") not in first
    return sharegpt.turns(value, place, options) if speaks else openai.turns(value, place, options)


def prompt_of(turns: list[Turn]) -> list[Turn]:
    """The turns of a prompt, which never train unless the data says so turn by turn."""
    for turn in turns:
        if turn.train == TRAIN_UNSET:
            turn.train = TRAIN_NO
    return turns


def after_prompt(prompt: list[Turn], answer: list[Turn], place: str) -> tuple[list[Turn], list[Turn]]:
    """The prompt and what answers it, where the answer may say the prompt again at its beginning, or more of the
    conversation than that. Raises BadRow for an answer that begins with another question, and for one to a prompt that
    is answered already: a row would ask, or answer, twice."""
    if answer[: len(prompt)] == prompt and answer[0].role != "text":
        return prompt, answer[len(prompt) :]
    if prompt and prompt[-1].role == answer[0].role == "assistant":
        raise BadRow(
            "answered already",
            f"the prompt before {place} ends with the assistant's turn: expected a user's or a tool's there",
        )
    if answer[0].role not in ASKING or not any(turn.role == "user" for turn in prompt):
        return prompt, answer
    if not any((turn.content or "").strip() for turn in prompt):
        return [], answer
    for end in range(len(answer) - 1, 0, -1):
        common = min(end, len(prompt))
        if all(map(_alike, answer[end - common : end], prompt[-common:])):
            return (answer[:end] if end >= len(prompt) else prompt), answer[end:]
    raise BadRow(
        "two prompts",
        f"{place} begins with a turn of {answer[0].role} that the prompt does not hold: expected the answer alone, or "
        "the prompt before it",
    )


def _alike(one: Turn, other: Turn) -> bool:
    return one.role == other.role and (one.content or "").strip() == (other.content or "").strip()


def split_answer(turns: list[Turn], place: str) -> tuple[list[Turn], list[Turn]]:
    """A conversation as the prompt and the assistant's last turn. Raises BadRow when another has the last word."""
    if turns[-1].role not in ("assistant", "text"):
        raise BadRow("no answer", f"{place} ends with a turn of {turns[-1].role}: expected the assistant's answer")
    return turns[:-1], turns[-1:]


_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def dialogue(text: str) -> list[Turn] | None:
    """A dialogue written as one text, `\\n\\nHuman: ...\\n\\nAssistant: ...`, as Anthropic's data has it; else None."""
    if not text.startswith(("\n\nHuman:", "Human:")):
        return None
    pieces = _SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Turn(roles[who], what) for who, what in zip(pieces[1::2], pieces[2::2], strict=True)]
