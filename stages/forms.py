"""Forms: what a chat template writes around the contents of conversations of one shape (the same roles in order).

Most templates only copy what is said. Where the template's syntax tree proves that (`stages.copying`), the render of
one conversation tells the render of every other of its shape, and a template runs once a shape instead of once a row.
Everything else is rendered by `stages.rendering`; what comes out is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from stages import rendering
from stages.chat_template import Template
from stages.copying import Copying
from stages.formats import BadRow, Conversation, Turn
from stages.marks import ORIGIN_CONTENT, ORIGIN_END, kind_of
from stages.rendering import Rendered, Span
from stages.sandbox import LARGEST
from stages.tables import Kinds, Numbers

MOST = 4096
"""Shapes that are remembered."""

Shape = tuple[tuple[str, int], ...]
"""Role and TRAIN_* of each turn."""


class Layout(NamedTuple):
    """The spans of a text as columns: their bytes, turns and kinds."""

    lengths: Numbers
    turns: Numbers
    kinds: Kinds


@dataclass(frozen=True, eq=False)
class Form:
    """The render of a shape, with gaps for the contents."""

    parts: list[bytes]
    """What stands before, between and after the contents."""
    length: int
    """Characters of all that."""
    layout: Layout
    """Of its spans, of which those of contents have no bytes yet."""
    gaps: Numbers
    """The places of the contents among the spans."""
    spans: list[Span]
    """Of the conversation it was learned from."""
    without_end: int
    """Turns of the assistant that nothing ends."""


class Formed(NamedTuple):
    """A conversation as text, like `rendering.Rendered`, but neither put together nor its spans written out."""

    form: Form
    contents: list[bytes]
    length: int
    """Characters of the text."""

    @property
    def pieces(self) -> list[bytes]:
        """The text from left to right."""
        pieces = [b""] * (2 * len(self.contents) + 1)
        pieces[::2] = self.form.parts
        pieces[1::2] = self.contents
        return pieces

    @property
    def text(self) -> str:
        """As `rendering.Rendered` has it."""
        return b"".join(self.pieces).decode()

    @property
    def spans(self) -> list[Span]:
        """As `rendering.Rendered` has them."""
        lengths = self.form.layout.lengths.copy()
        lengths[self.form.gaps] = [len(content) for content in self.contents]
        ends = np.cumsum(lengths).tolist()
        return [
            span._replace(start=start, end=end)
            for span, start, end in zip(self.form.spans, [0, *ends[:-1]], ends, strict=True)
        ]

    @property
    def unwritten(self) -> list[str]:
        """A form writes everything."""
        return []


def laid_out(spans: Sequence[Span]) -> Layout:
    """Spans as columns."""
    return Layout(
        np.array([span.end - span.start for span in spans], np.int64),
        np.array([span.turn for span in spans], np.int64),
        np.array([kind_of(span.origin, span.role, span.train) for span in spans], np.uint8),
    )


def without_end(spans: Sequence[Span]) -> int:
    """Turns of the assistant that nothing ends: the model would not learn to stop there."""
    last = {span.turn: span.origin for span in spans if span.role == "assistant"}
    return sum(origin != ORIGIN_END for origin in last.values())


@dataclass
class Forms:
    """Renders conversations with one template, by their forms where it can."""

    template: Template
    known: dict[Shape, Form | None] = field(default_factory=dict)
    """None for a shape that the template does not write out turn by turn."""

    def __post_init__(self) -> None:
        # The environment's own parse: it holds what the environment adds to a template.
        proof = Copying(self.template.compiled.environment.parse(self.template.source))
        self.copies, self.trims, self.roles = proof.copies, proof.trims, proof.roles

    def render(self, conversation: Conversation, contents: list[bytes] | None) -> Rendered | Formed:
        """What `rendering.render` gives, perhaps sooner; `contents` is what `plain` tells of the conversation. Raises
        what that raises."""
        turns = conversation.turns
        if not self.copies or contents is None or not self._goes_in_whole(turns, contents):
            return rendering.render(self.template, conversation)
        shape = tuple([(turn.role, turn.train) for turn in turns])
        if self.roles and any(role in self.roles for role, _ in shape):
            return rendering.render(self.template, conversation)
        if shape not in self.known:
            rendered = rendering.render(self.template, conversation)
            if len(self.known) < MOST:
                self.known[shape] = _learned(rendered, contents)
            return rendered
        form = self.known[shape]
        if form is None:
            return rendering.render(self.template, conversation)
        return Formed(form, contents, form.length + sum([len(turn.content or "") for turn in turns]))

    def _goes_in_whole(self, turns: list[Turn], contents: list[bytes]) -> bool:
        """Whether trimming changes no content, none is as good as absent, and all are far from any limit."""
        if not all(contents) or sum(map(len, contents)) > LARGEST // 4:
            return False
        said = [turn.content or "" for turn in turns] if self.trims else []
        return not any(text[0].isspace() or text[-1].isspace() for text in said)


def plain(conversation: Conversation) -> list[bytes] | None:
    """The contents in UTF-8, where roles, contents and their training flags are all there is; else None.

    Raises BadRow when one holds half a surrogate pair, which no UTF-8 can say.
    """
    if conversation.tools is not None or conversation.ids is not None:
        return None
    contents = []
    for turn in conversation.turns:
        if (
            turn.content is None
            or turn.reasoning is not None
            or turn.tool_calls is not None
            or turn.name is not None
            or turn.tool_call_id is not None
            or turn.runs is not None
        ):
            return None
        contents.append(turn.content)
    try:
        return [content.encode() for content in contents]
    except UnicodeEncodeError as error:
        raise BadRow("not Unicode", f"holds half a surrogate pair: {error}") from error


def _learned(rendered: Rendered, contents: list[bytes]) -> Form | None:
    """The form of a render, if it holds every content once, whole and in order."""
    data, spans = rendered.text.encode(), rendered.spans
    said = [span for span in spans if span.origin == ORIGIN_CONTENT]
    if rendered.unwritten or [(s.turn, data[s.start : s.end]) for s in said] != list(enumerate(contents)):
        return None
    borders = [0, *(at for span in said for at in (span.start, span.end)), len(data)]
    parts = [data[low:high] for low, high in zip(borders[::2], borders[1::2], strict=True)]
    layout = laid_out(spans)
    gaps = np.array([place for place, span in enumerate(spans) if span.origin == ORIGIN_CONTENT], np.int64)
    layout.lengths[gaps] = 0
    return Form(parts, sum(len(part.decode()) for part in parts), layout, gaps, spans, without_end(spans))
