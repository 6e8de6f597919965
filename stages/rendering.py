"""Rendering: a conversation through a chat template, once, with the origin of every byte.

`load` compiles a template in a sandbox set up like the one of Hugging Face's transformers, so the text is the same,
and learns from a few small renders how the template opens and ends turns. The data goes in as `Traced` strings (see
`stages.traced`), so the render itself tells data and template apart: its cost is linear in the turns.
"""

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    """Named tokens (`bos_token`, ...) that the template may use."""
    control: tuple[str, ...] = ()
    """Token texts that only the template may write: the special tokens, and added ones that stand in its source."""
    opening: str = ""
    """What stands between a user's content and the answer: header and all. The model never has to write it."""
    prompt: str = ""
    """The part of `opening` that `add_generation_prompt` adds."""
    header: str = ""
    """The beginning of `prompt`, up to its first control token."""
    endings: tuple[str, ...] = ()
    """Texts that end a turn."""
    calls: "Calls | None" = None
    """How it takes tool calls; None where it knows none."""


class Calls(NamedTuple):
    """How tool calls are handed to a template: they differ in what they can take."""

    silence: Mapping[str, str | None]
    """What a turn without content says: nothing, `{"content": None}` or `{"content": ""}`."""
    as_text: bool
    """Whether arguments come as JSON text instead of an object."""


class Leaf(NamedTuple):
    """A string of the data that was handed to the template."""

    turn: int
    kind: str


CONTENT, REASONING, CALLS, NAMES, TOOLS = "content", "reasoning", "tool calls", "names", "tools"

Chunk = tuple[str, Leaf | None, bool]
"""A piece of the render, the leaf that it came from (None: the template), and whether that leaf was written before."""

_QUESTION = Turn("user", "?")
_ANSWER = Turn("assistant", "!")
_CALL = Turn(
    "assistant",
    None,
    tool_calls=[{"id": "000000000", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}],
)


def load(tokenizer: Tokenizer, choice: str, today: datetime.date | None = None) -> Template:
    """Compile the template `choice`: `tokenizer`, a named one, or Jinja text.

    `today` is what the template gets when it asks for the date. Raises UserError when there is no such template, or
    when it cannot be compiled or does not write a plain question and answer.
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
    bare = Template(compiled, tokenizer.variables)
    try:
        after_question = _after(bare, [_QUESTION])
        after_answer = _after(bare, [_QUESTION, _ANSWER])
        opening = _after(bare, [_QUESTION], add_generation_prompt=True)
    except BadRow as error:
        raise UserError(f"the chat template fails on a plain question and answer: {error}") from error
    literal = {text for text in tokenizer.added if text in source and not text.isspace()}
    control = tuple(sorted({*tokenizer.special, *literal}))
    endings = {_ending(after, control) for after in (after_question, after_answer)} - {""}
    calls, after_call = _calls(bare)
    if not any(ending in after_call for ending in endings):
        endings |= {token for token in control if after_call.rstrip().endswith(token)}
    prompt = opening.removeprefix(after_question) if opening.startswith(after_question) else ""
    header = _ending(prompt, control) or prompt
    return Template(compiled, tokenizer.variables, control, opening, prompt, header, tuple(sorted(endings)), calls)


def _after(template: Template, turns: list[Turn], **more: bool) -> str:
    """What the template writes after the last leaf. Raises BadRow when it leaves out the last turn."""
    chunks = _chunks(template, Conversation(turns), **more)
    written = {leaf.turn for _, leaf, _ in chunks if leaf}
    if len(turns) - 1 not in written:
        raise BadRow("left out by the chat template", f"it leaves out what the {turns[-1].role} says")
    return "" if chunks[-1][1] else chunks[-1][0]


def _ending(after: str, control: tuple[str, ...]) -> str:
    """The text that ends a turn, from what stands after the last one: up to its first control token, if any."""
    ends = [after.index(token) + len(token) for token in control if token in after]
    return after[: min(ends)] if ends else after.rstrip()


def _calls(bare: Template) -> tuple[Calls | None, str]:
    """How the template takes tool calls, and what it writes after one."""
    silences: list[Mapping[str, str | None]] = [{}, {"content": None}, {"content": ""}]
    for calls in (Calls(silence, as_text) for as_text in (False, True) for silence in silences):
        try:
            return calls, _after(Template(bare.compiled, bare.variables, calls=calls), [_QUESTION, _CALL])
        except BadRow:
            continue
    return None, ""


def render(template: Template, conversation: Conversation) -> Rendered:
    """Render a conversation once. Raises BadRow when the template refuses it or leaves out what is to be learned."""
    for number, turn in enumerate(conversation.turns):
        if turn.tool_calls and template.calls is None:
            detail = f"the chat template does not write tool calls (turn {number}): choose one that does"
            raise BadRow("left out by the chat template", detail)
    chunks = _chunks(template, conversation)
    unwritten = _unwritten(conversation, chunks)
    return Rendered(
        "".join(text for text, _, _ in chunks),
        spans(_pieces(template, conversation.turns, chunks), conversation.turns),
        unwritten,
    )


def _chunks(template: Template, conversation: Conversation, **more: bool) -> list[Chunk]:
    """The render as pieces in order."""
    leaves: list[Leaf] = []
    calls = template.calls or Calls({}, False)
    messages = [_message(turn, number, calls, leaves) for number, turn in enumerate(conversation.turns)]
    tools = _marked(conversation.tools, Leaf(NO_TURN, TOOLS), leaves) if conversation.tools else None
    context = {"add_generation_prompt": False, "documents": None, **template.variables, **more}
    try:
        text = template.compiled.render(messages=messages, tools=tools, **context)
    except Untraceable as error:
        raise UserError(f"the chat template cannot be followed: {error}; name or write another one") from error
    except jinja2.TemplateError as error:
        raise BadRow("refused by the chat template", f"the chat template refuses it: {error.message}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise BadRow("refused by the chat template", f"the chat template fails on it: {error}") from error
    chunks: list[Chunk] = []
    seen: set[int] = set()
    at = 0
    for length, number in traced.runs_of(text):
        piece = str.__getitem__(text, slice(at, at + length))
        chunks.append((piece, None, False) if number == TEMPLATE else (piece, leaves[number], number in seen))
        seen.add(number)
        at += length
    return chunks


def _message(turn: Turn, number: int, calls: Calls, leaves: list[Leaf]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, **(calls.silence if turn.content is None else {})}
    if turn.content is not None:
        message["content"] = _marked(turn.content, Leaf(number, CONTENT), leaves)
    if turn.reasoning is not None:
        # The names that templates read it by.
        message["reasoning_content"] = message["thinking"] = _marked(turn.reasoning, Leaf(number, REASONING), leaves)
    if turn.tool_calls is not None:
        message["tool_calls"] = [_tool_call(call, number, calls, leaves) for call in turn.tool_calls]
    for name in ("name", "tool_call_id"):
        if (value := getattr(turn, name)) is not None:
            message[name] = _marked(value, Leaf(number, NAMES), leaves)
    return message


def _tool_call(call: Mapping[str, Any], number: int, calls: Calls, leaves: list[Leaf]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if calls.as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    marked = {
        "name": _marked(function["name"], Leaf(number, CALLS), leaves),
        "arguments": _marked(arguments, Leaf(number, CALLS), leaves),
    }
    identity = {"id": _marked(call["id"], Leaf(number, NAMES), leaves)} if "id" in call else {}
    return {**identity, "type": "function", "function": marked}


def _marked(value: Any, leaf: Leaf, leaves: list[Leaf]) -> Any:
    """The value with each of its strings traced to a number of its own in `leaves`."""

    def number() -> int:
        leaves.append(leaf)
        return len(leaves) - 1

    return traced.mark(value, number)


def _pieces(template: Template, turns: list[Turn], chunks: list[Chunk]) -> list[tuple[str, int, int]]:
    """(text, origin, turn): what the template wrote between two leaves is split into turn end, header and the rest."""
    # A template may write a tool's name again with the tool's answer: nobody says that a second time.
    turn_of = [
        NO_TURN if leaf is None or (again and leaf.kind in (CALLS, NAMES)) else leaf.turn for _, leaf, again in chunks
    ]
    pieces: list[tuple[str, int, int]] = []
    seen: set[int] = set()
    for number, (text, leaf, _) in enumerate(chunks):
        if leaf is not None:
            seen.add(turn_of[number])
            pieces.append((text, ORIGIN_CONTENT, turn_of[number]))
            continue
        before = chunks[number - 1][1] if number else None
        after = chunks[number + 1][1] if number + 1 < len(chunks) else None
        if before and after and before.kind == after.kind == TOOLS and not any(t in text for t in template.control):
            pieces.append((text, ORIGIN_CONTENT, NO_TURN))  # punctuation of the tools' JSON: not worth spans of its own
        else:
            last = turn_of[number - 1] if before else NO_TURN
            following = turn_of[number + 1] if after else NO_TURN
            pieces += _split(template, turns, text, last, following, following not in seen)
    return pieces


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
            # The prompt may go on (`<think>\n`) where this turn does not: what they share is what is given.
            at = text.rfind(template.header, end)
            begin = at + _shared(text[at:], template.prompt) if at >= 0 else begin
        elif text.startswith(template.opening):
            begin = max(end, len(template.opening))
    return [
        (text[:end], ORIGIN_END, last),
        (text[end:begin], ORIGIN_TEMPLATE, NO_TURN),
        (text[begin:], ORIGIN_END, following),
    ]


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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


def _unwritten(conversation: Conversation, chunks: list[Chunk]) -> list[str]:
    """What the row has and the render lacks. Raises BadRow when the assistant's part is one of a kind that trains."""
    written = {leaf for _, leaf, _ in chunks}
    missing = ["tools"] if conversation.tools and Leaf(NO_TURN, TOOLS) not in written else []
    for number, turn in enumerate(conversation.turns):
        said = {CONTENT: (turn.content or "").strip(), REASONING: turn.reasoning, CALLS: turn.tool_calls}
        absent = [kind for kind, value in said.items() if value and Leaf(number, kind) not in written]
        silent = all(kind in absent for kind, value in said.items() if value)
        if turn.role == "assistant" and absent and (CALLS in absent or silent):
            raise BadRow(
                "left out by the chat template",
                f"the chat template leaves out turn {number}'s {' and '.join(absent)}: choose one that writes it",
            )
        missing += [f"{kind} of {turn.role}" for kind in absent]
    return missing
