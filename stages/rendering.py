"""Rendering: a conversation as text, with the origin of every byte. Its cost is linear in the turns.

The template's one render itself tells data and template apart (see `stages.chunks`). What is left to do here is to
split what the template wrote between two strings of data: the end of a turn, the header of the next, and what the
assistant has to write although it is no data, such as the markup around a tool call.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from stages.chat_template import Template, side_by_side
from stages.chunks import CALLS, CONTENT, NAMES, REASONING, TOOLS, Chunk, render_chunks
from stages.formats import BadRow, Conversation, Turn
from stages.marks import NO_TURN, ORIGIN_CONTENT, ORIGIN_END, ORIGIN_TEMPLATE, TRAIN_UNSET


class Span(NamedTuple):
    """One range of the rendered text in UTF-8 bytes, as `stages.tables.SPAN` packs it."""

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

    @property
    def length(self) -> int:
        """Characters of the text."""
        return len(self.text)


def render(template: Template, conversation: Conversation, *, prompt: bool = False) -> Rendered:
    """Render a conversation once; `prompt` asks the assistant to go on, as inference does (`add_generation_prompt`).

    Raises BadRow when the template refuses it or leaves out what is to be learned.
    """
    if len(conversation.turns) > NO_TURN:
        raise BadRow("too many turns", f"has {len(conversation.turns)} turns: expected at most {NO_TURN}")
    for number, turn in enumerate(conversation.turns):
        if turn.tool_calls and template.calls is None:
            detail = f"the chat template does not write tool calls (turn {number}): choose one that does"
            raise BadRow("left out by the chat template", detail)
    chunks = render_chunks(
        template.compiled, template.variables, template.calls, conversation, add_generation_prompt=prompt
    )
    unwritten = _unwritten(conversation, chunks)
    return Rendered(
        "".join(text for text, _, _ in chunks),
        spans(_pieces(template, conversation.turns, chunks), conversation.turns),
        unwritten,
    )


Piece = tuple[str, int, int, int | None]
"""Text, its ORIGIN_*, its turn, and its TRAIN_* (None: the turn's)."""


def _pieces(template: Template, turns: list[Turn], chunks: list[Chunk]) -> list[Piece]:
    """What the template wrote between two leaves is split into turn end, header and the rest."""
    turn_of = _turns(template, chunks)
    pieces: list[Piece] = []
    seen: set[int] = set()
    for number, (text, leaf, _) in enumerate(chunks):
        if leaf is not None:
            seen.add(turn_of[number])
            pieces.append((text, ORIGIN_CONTENT, turn_of[number], leaf.train))
            continue
        before = chunks[number - 1][1] if number else None
        after = chunks[number + 1][1] if number + 1 < len(chunks) else None
        if before and after and before.kind == after.kind == TOOLS and not any(t in text for t in template.control):
            pieces.append(
                (text, ORIGIN_CONTENT, NO_TURN, None)
            )  # punctuation of the tools' JSON: not worth spans of its own
        else:
            last = turn_of[number - 1] if before else NO_TURN
            following = turn_of[number + 1] if after else NO_TURN
            pieces += _split(template, turns, text, last, following, following not in seen)
    return pieces


def _turns(template: Template, chunks: list[Chunk]) -> list[int]:
    """The turn that says each chunk's leaf. A template may write a tool's name again with the tool's answer: nobody
    says that a second time, unless it is still within the turn that calls the tool."""
    found = []
    current = NO_TURN
    for text, leaf, again in chunks:
        if leaf is None:
            found.append(NO_TURN)
            current = NO_TURN if any(ending in text for ending in template.endings) else current
        elif again and leaf.kind in (CALLS, NAMES) and leaf.turn != current:
            found.append(NO_TURN)
        else:
            found.append(current := leaf.turn)
    return found


def _split(template: Template, turns: list[Turn], text: str, last: int, following: int, opens: bool) -> list[Piece]:
    """Split the template's text between a leaf of turn `last` and one of turn `following` (`opens`: its first)."""
    if last == following:  # inside a turn, such as around a tool's name: the assistant has to write it too
        inside = last != NO_TURN and turns[last].role == "assistant"
        return [(text, ORIGIN_END, last, None) if inside else (text, ORIGIN_TEMPLATE, NO_TURN, None)]
    ends = [text.index(ending) + len(ending) for ending in template.endings if ending in text]
    end = min(ends) if ends and last != NO_TURN else 0
    if end and end < max(ends) and (following if following != NO_TURN else len(turns)) == last + 1:
        # Several tokens side by side may end a turn, if there is no silent one whose end that could be.
        end = max({*ends} & {end, *side_by_side(text, end, template.control)})
    begin = len(text)
    if opens and following != NO_TURN and turns[following].role == "assistant":
        # The prompt may go on (`<think>\n`) where this turn does not: what they share is what is given.
        at = text.rfind(template.header, end) if template.prompt else -1
        if at >= 0:
            begin = at + _shared(text[at:], template.prompt, template.control)
        elif (said := template.openings.get(turns[following - 1].role, "")) and said in text:
            begin = max(end, text.rindex(said) + len(said))
        elif last != NO_TURN:
            begin = max(end, _shared(text, template.openings.get(turns[last].role, text), template.control))
    return [
        (text[:end], ORIGIN_END, last, None),
        (text[end:begin], ORIGIN_TEMPLATE, NO_TURN, None),
        (text[begin:], ORIGIN_END, following, None),
    ]


def _shared(a: str, b: str, control: tuple[str, ...]) -> int:
    """How many characters two texts have in common at their beginning, of control tokens only whole ones."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if same == len(b):
        return same
    over = ((text, token, max(0, same - len(token) + 1), same + len(token) - 1) for token in control for text in (a, b))
    split = [text.find(token, low, high) for text, token, low, high in over]
    return min([same, *(start for start in split if start >= 0)])


def spans(pieces: Iterable[Piece], turns: list[Turn]) -> list[Span]:
    """Pieces from left to right as spans in bytes: empty ones left out, equal neighbours joined."""
    found: list[Span] = []
    start = 0
    for text, origin, turn, own in pieces:
        end = start + (len(text) if text.isascii() else len(text.encode()))
        if end > start:
            role, train = (turns[turn].role, turns[turn].train) if turn != NO_TURN else ("", TRAIN_UNSET)
            train = train if own is None else own
            if found and found[-1][2:4] == (origin, turn) and found[-1].train == train:
                found[-1] = found[-1]._replace(end=end)
            else:
                found.append(Span(start, end, origin, turn, role, train))
        start = end
    return found


_THOUGHT = re.compile(r"</think>|\[/THINK\]")
_MARKS = re.compile(r"</?think>|\[/?THINK\]")
"""What reasoning in a content stands between, which a template that splits it may write itself."""


def _unwritten(conversation: Conversation, chunks: list[Chunk]) -> list[str]:
    """What the row has and the render lacks. Raises BadRow when the assistant's part is one of a kind that trains."""
    written: dict[tuple[int, str], int] = {}
    calls: set[tuple[int, int | None]] = set()
    for text, leaf, _ in chunks:
        if leaf:
            written[leaf[:2]] = written.get(leaf[:2], 0) + len(text)
            calls.add((leaf.turn, leaf.call))
    missing = ["tools"] if conversation.tools and (NO_TURN, TOOLS) not in written else []
    for number, turn in enumerate(conversation.turns):
        said = {CONTENT: (turn.content or "").strip(), REASONING: turn.reasoning, CALLS: turn.tool_calls}
        absent = [kind for kind, value in said.items() if value and (number, kind) not in written]
        if CALLS not in absent and any((number, call) not in calls for call in range(len(turn.tool_calls or ()))):
            absent.append(CALLS)
        silent = all(kind in absent for kind, value in said.items() if value)
        if turn.role == "assistant" and absent and (CALLS in absent or silent):
            raise BadRow(
                "left out by the chat template",
                f"the chat template leaves out turn {number}'s {' and '.join(absent)}: choose one that writes it",
            )
        missing += [f"{kind} of {turn.role}" for kind in absent]
        for kind, text in ((CONTENT, turn.content or ""), (REASONING, turn.reasoning or "")):
            there = written.get((number, kind), len(text))
            if there < len(text.strip()) and _lost(text, chunks, number, kind):
                thought = kind == CONTENT and _THOUGHT.search(text)
                missing.append(f"{'reasoning' if thought else f'part of the {kind}'} of {turn.role}")
        if turn.role == "assistant" and not any((number, kind) in written for kind in (CONTENT, REASONING, CALLS)):
            missing.append("empty answer of assistant")  # whose end is not known then, and does not train
    return missing


def _lost(text: str, chunks: list[Chunk], turn: int, kind: str) -> bool:
    """Whether the render lacks more of a text than white space and the marks around reasoning."""
    written = "".join(piece for piece, leaf, _ in chunks if leaf and leaf[:2] == (turn, kind))
    said, there = ("".join(_MARKS.sub("", one).split()) for one in (text, written))
    return len(there) < len(said)
