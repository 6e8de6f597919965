"""Forms: what a chat template writes around the contents of conversations of one shape (the same roles in order).

Most templates only copy what is said. Where the template's syntax tree proves that (`stages.copying`), the render of
one conversation tells the render of every other of its shape, and a template runs once a shape instead of once a row.
Everything else is rendered by `stages.rendering`; what comes out is the same.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from stages import rendering
from stages.chat_template import Template
from stages.copying import Copying
from stages.formats import Conversation
from stages.marks import ORIGIN_CONTENT, kind_of
from stages.rendering import Rendered, Span
from stages.sandbox import LARGEST

MOST = 4096
"""Shapes that are remembered."""

Shape = tuple[tuple[str, int], ...]
"""Role and TRAIN_* of each turn."""


@dataclass(frozen=True, eq=False)
class Form:
    """The render of a shape, with gaps for the contents."""

    parts: list[str]
    """What stands before, between and after the contents."""
    lengths: list[int]
    """Bytes of each span, 0 for a content."""
    gaps: list[int]
    """The places of the contents in `lengths`."""
    turns: list[int]
    kinds: list[int]
    spans: list[Span]
    """Of the conversation it was learned from."""


class Formed(NamedTuple):
    """A conversation as text, like `rendering.Rendered`, its spans not written out."""

    text: str
    form: Form
    sizes: list[int]
    """Bytes of each content."""

    @property
    def unwritten(self) -> list[str]:
        """A form writes everything."""
        return []

    def ends(self) -> list[int]:
        """The end of each span in bytes."""
        lengths = self.form.lengths.copy()
        for gap, size in zip(self.form.gaps, self.sizes, strict=True):
            lengths[gap] = size
        return list(accumulate(lengths))

    @property
    def spans(self) -> list[Span]:
        """As `rendering.Rendered` has them."""
        ends = self.ends()
        starts = [0, *ends[:-1]]
        return [
            span._replace(start=start, end=end) for span, start, end in zip(self.form.spans, starts, ends, strict=True)
        ]


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

    def render(self, conversation: Conversation) -> Rendered | Formed:
        """What `rendering.render` gives, perhaps sooner. Raises what that raises."""
        turns = conversation.turns
        if not self.copies or not plain(conversation):
            return rendering.render(self.template, conversation)
        contents = [turn.content or "" for turn in turns]
        if not self._goes_in_whole(contents):
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
        pieces = [""] * (2 * len(contents) + 1)
        pieces[::2] = form.parts
        pieces[1::2] = contents
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in contents]
        return Formed("".join(pieces), form, sizes)

    def _goes_in_whole(self, contents: list[str]) -> bool:
        """Whether trimming changes no content, none is as good as absent, and all are far from any limit."""
        if not all(contents) or sum(map(len, contents)) > LARGEST // 4:
            return False
        return not self.trims or not any(text[0].isspace() or text[-1].isspace() for text in contents)


def plain(conversation: Conversation) -> bool:
    """Whether roles, contents and their training flags are all there is."""
    if conversation.tools is not None or conversation.ids is not None:
        return False
    for turn in conversation.turns:
        if (
            turn.content is None
            or turn.reasoning is not None
            or turn.tool_calls is not None
            or turn.name is not None
            or turn.tool_call_id is not None
            or turn.runs is not None
        ):
            return False
    return True


def _learned(rendered: Rendered, contents: list[str]) -> Form | None:
    """The form of a render, if it holds every content once, whole and in order."""
    data = rendered.text.encode()
    said = [span for span in rendered.spans if span.origin == ORIGIN_CONTENT]
    if rendered.unwritten or [(s.turn, data[s.start : s.end].decode()) for s in said] != list(enumerate(contents)):
        return None
    borders = [0, *(at for span in said for at in (span.start, span.end)), len(data)]
    spans = rendered.spans
    return Form(
        parts=[data[low:high].decode() for low, high in zip(borders[::2], borders[1::2], strict=True)],
        lengths=[0 if span.origin == ORIGIN_CONTENT else span.end - span.start for span in spans],
        gaps=[place for place, span in enumerate(spans) if span.origin == ORIGIN_CONTENT],
        turns=[span.turn for span in spans],
        kinds=[kind_of(span.origin, span.role, span.train) for span in spans],
        spans=spans,
    )
