"""Rendering: a conversation through a chat template, once, with the origin of every byte.

`load` compiles a template in a sandbox set up like the one of Hugging Face's transformers, so the text is the same.
The data goes in as `Traced` strings (see `stages/traced.py`), so the render itself tells data and template apart.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import jinja2

from stages import sandbox, templates, traced
from stages.errors import UserError
from stages.formats import BadRow, Conversation, Turn
from stages.tables import ORIGIN_CONTENT, ORIGIN_END, ORIGIN_TEMPLATE, TRAIN_UNSET
from stages.tokenizer_files import Tokenizer
from stages.traced import TEMPLATE, Untraceable

NO_TURN = -1


class Span(NamedTuple):
    """One range of the rendered text in UTF-8 bytes; the fields are those of `stages.tables.SPAN`."""

    start: int
    end: int
    origin: int
    turn: int
    role: str
    train: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where each byte of it came from."""

    text: str
    spans: list[Span]
    unwritten: list[str]
    """What the row has but the template left out, e.g. `reasoning of assistant`."""


@dataclass(frozen=True)
class Template:
    """A compiled template with what was learned about it."""

    compiled: jinja2.Template
    variables: dict[str, str]
    control: tuple[str, ...]
    """Token texts that only the template may write: the special tokens, and added ones that stand in it."""
    opening: str
    """What stands between a user's content and the answer: header and all. The model never has to write it."""
    prompt: str
    """The part of `opening` that `add_generation_prompt` adds."""
    endings: tuple[str, ...]
    """Texts that end a turn."""


def load(tokenizer: Tokenizer, choice: str, today: date | None = None) -> Template:
    """Compile the template `choice`: `tokenizer`, a named one, or Jinja text.

    `today` is what the template gets when it asks for the date. Raises UserError when there is no such template, or
    when it cannot be compiled or does not render a plain question and answer.
    """
    if choice == "tokenizer":
        if tokenizer.template is None:
            raise UserError(
                "the model's tokenizer has no chat template: name one, e.g. `convert.template: chatml`, or choose "
                "`convert.format: completion`"
            )
        source = tokenizer.template
    else:
        source = templates.find(choice).text if choice in templates.names() else choice
    try:
        compiled = sandbox.environment(today).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error
    literal = tuple(text for text in tokenizer.added if text in source and not text.isspace())
    control = tuple(sorted({*tokenizer.special, *literal}))
    variables = tokenizer.variables
    try:
        asked = _chunks(compiled, variables, Conversation([Turn("user", "?")]))
        prompted = _chunks(compiled, variables, Conversation([Turn("user", "?")]), add_generation_prompt=True)
        answered = _chunks(compiled, variables, Conversation([Turn("user", "?"), Turn("assistant", "!")]))
    except BadRow as error:
        raise UserError(f"the chat template fails on a plain question and answer: {error}") from error
    after_question = asked[-1][0] if asked[-1][1] == TEMPLATE else ""
    opening = prompted[-1][0] if prompted[-1][1] == TEMPLATE else ""
    after_answer = answered[-1][0] if answered[-1][1] == TEMPLATE else ""
    endings = {_ending(after, control) for after in (after_question, after_answer)} - {""}
    prompt = opening.removeprefix(after_question) if opening.startswith(after_question) else ""
    return Template(compiled, variables, control, opening, prompt, tuple(sorted(endings)))


def _ending(after: str, control: tuple[str, ...]) -> str:
    """The text that ends a turn, from what stands after the last one: up to its first control token, if any."""
    ends = [after.index(token) + len(token) for token in control if token in after]
    return after[: min(ends)] if ends else after.rstrip()


def render(template: Template, conversation: Conversation) -> Rendered:
    """Render a conversation once. Raises BadRow when the template refuses it or leaves out what is to be learned."""
    chunks = _chunks(template.compiled, template.variables, conversation)
    unwritten = _unwritten(conversation, {leaf for _, leaf in chunks})
    found = spans(_pieces(template, conversation.turns, chunks), conversation.turns)
    return Rendered("".join(text for text, _ in chunks), found, unwritten)


_CONTENT, _REASONING, _CALLS = 0, 1, 2
_KINDS = ("content", "reasoning", "tool calls")
_TOOLS = -2
"""Leaf numbers: 3 * turn + kind, `_TOOLS` for the tools on offer, `TEMPLATE` for the template's own text."""


def _chunks(
    compiled: jinja2.Template, variables: Mapping[str, str], conversation: Conversation, **more: bool
) -> list[tuple[str, int]]:
    """The render as (text, leaf) pieces in order."""
    messages = [_message(turn, 3 * number) for number, turn in enumerate(conversation.turns)]
    tools = traced.mark(conversation.tools, _TOOLS) if conversation.tools else None
    context = {"add_generation_prompt": False, "documents": None, **variables, **more}
    try:
        text = compiled.render(messages=messages, tools=tools, **context)
    except Untraceable as error:
        raise UserError(f"the chat template cannot be followed: {error}; name or write another one") from error
    except jinja2.TemplateError as error:
        raise BadRow("refused by the chat template", f"the chat template refuses it: {error.message}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise BadRow("refused by the chat template", f"the chat template fails on it: {error}") from error
    chunks, at = [], 0
    for length, leaf in traced.runs_of(text):
        chunks.append((str.__getitem__(text, slice(at, at + length)), leaf))
        at += length
    return chunks


def _message(turn: Turn, leaf: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role}
    if turn.content is not None:
        message["content"] = traced.mark(turn.content, leaf + _CONTENT)
    if turn.reasoning is not None:
        # The names that templates read it by.
        message["reasoning_content"] = message["thinking"] = traced.mark(turn.reasoning, leaf + _REASONING)
    if turn.tool_calls is not None:
        message["tool_calls"] = [_call(call, leaf + _CALLS) for call in turn.tool_calls]
    if turn.name is not None:
        message["name"] = traced.mark(turn.name, leaf + _CONTENT)
    if turn.tool_call_id is not None:
        message["tool_call_id"] = traced.mark(turn.tool_call_id, leaf + _CONTENT)
    return message


def _call(call: Mapping[str, Any], leaf: int) -> dict[str, Any]:
    return {
        name: traced.mark(value, leaf) if name != "function" else _call(value, leaf) for name, value in call.items()
    }


def _pieces(template: Template, turns: list[Turn], chunks: list[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Name every chunk, and split what the template wrote between two leaves into turn end, header and the rest."""
    pieces: list[tuple[str, int, int]] = []  # text, origin, turn
    seen: set[int] = set()
    last = NO_TURN
    for number, (text, leaf) in enumerate(chunks):
        if leaf == TEMPLATE:
            following = _turn_of(chunks[number + 1][1]) if number + 1 < len(chunks) else NO_TURN
            pieces += _split(template, turns, text, last, following, following not in seen)
        else:
            last = _turn_of(leaf)
            seen.add(last)
            pieces.append((text, ORIGIN_CONTENT, last))
    return pieces


def spans(pieces: Iterable[tuple[str, int, int]], turns: list[Turn]) -> list[Span]:
    """(text, origin, turn) from left to right as spans in bytes: empty ones left out, equal neighbours joined."""
    found: list[Span] = []
    start = 0
    for text, origin, turn in pieces:
        end = start + (len(text) if text.isascii() else len(text.encode()))
        if found and found[-1][2:4] == (origin, turn):
            found[-1] = found[-1]._replace(end=end)
        elif end > start:
            role, train = (turns[turn].role, turns[turn].train) if turn != NO_TURN else ("", TRAIN_UNSET)
            found.append(Span(start, end, origin, turn, role, train))
        start = end
    return found


def _turn_of(leaf: int) -> int:
    return leaf // 3 if leaf >= 0 else NO_TURN


def _split(
    template: Template, turns: list[Turn], text: str, last: int, following: int, opens: bool
) -> list[tuple[str, int, int]]:
    """Split the template's text between a leaf of turn `last` and one of turn `following` (`opens`: its first)."""
    if last == following:  # inside a turn, such as around a tool's name: the assistant has to write it too
        inside = last != NO_TURN and turns[last].role == "assistant"
        return [(text, ORIGIN_END, last) if inside else (text, ORIGIN_TEMPLATE, NO_TURN)]
    ends = [text.index(ending) + len(ending) for ending in template.endings if ending in text]
    end = min(ends) if ends and last != NO_TURN else 0
    begin = len(text)
    if opens and following != NO_TURN and turns[following].role == "assistant":
        if template.prompt:
            at = text.rfind(template.prompt, end)
            begin = at + len(template.prompt) if at >= 0 else begin
        elif text.startswith(template.opening):
            begin = max(end, len(template.opening))
    return [
        (text[:end], ORIGIN_END, last),
        (text[end:begin], ORIGIN_TEMPLATE, NO_TURN),
        (text[begin:], ORIGIN_END, following),
    ]


def _unwritten(conversation: Conversation, written: set[int]) -> list[str]:
    """What the row has and the render lacks. Raises BadRow when that is something the assistant said or called."""
    missing = ["tools"] if conversation.tools and _TOOLS not in written else []
    for number, turn in enumerate(conversation.turns):
        said = ((turn.content or "").strip(), turn.reasoning, turn.tool_calls)
        for kind, value in zip((_CONTENT, _REASONING, _CALLS), said, strict=True):
            if value and 3 * number + kind not in written:
                what = f"{_KINDS[kind]} of {turn.role}"
                if turn.role == "assistant" and kind != _REASONING:
                    detail = f"the chat template leaves out turn {number}'s {_KINDS[kind]}: choose one that writes it"
                    raise BadRow("left out by the chat template", detail)
                missing.append(what)
    return missing
