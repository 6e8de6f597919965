"""From what a row means to what the model is to see: its sequences as text with spans, and the row's identity."""

import hashlib
import json
from dataclasses import replace
from typing import Any, NamedTuple

from stages import rendering
from stages.formats import BadRow, Conversation, Example, Reader, Reasoning, Turn
from stages.forms import Formed, Forms, plain, without_end
from stages.marks import NO_TURN, ORIGIN_CONTENT, ORIGIN_END, ORIGIN_TEMPLATE, TRAIN_NO
from stages.rendering import Piece, Rendered, Span
from stages.row_fields import as_text, kind_of
from stages.tokenized import SEQUENCES
from stages.tokenizer_files import Tokenizer

LONGEST = 1 << 28
"""Characters that a sequence may have."""


class Written(NamedTuple):
    """One row of `stages.tables.CONVERSATIONS`."""

    row: int
    part: int
    rendered: Rendered | Formed
    identity: bytes
    extra: str
    ids: list[int] | None


class Sequencer(NamedTuple):
    """What the rows of a shard have in common."""

    reader: Reader
    tokenizer: Tokenizer
    forms: Forms | None
    """Of the chat template, where there is one."""
    reasoning: Reasoning
    trusted: bool = False
    """Whether special tokens in the data are control tokens."""

    def sequences(self, number: int, made: Conversation | Example) -> list[Written]:
        """A row's sequences; `number` is its own. Raises BadRow."""
        parts = [made] if isinstance(made, Conversation) else made.parts
        if self.reasoning != "keep":
            for part in parts:
                _forget(part.turns, self.reasoning)
        contents = [plain(part) for part in parts]
        extra, digest = _extra(made), _identity(made, contents)
        if len(parts) != (wanted := SEQUENCES.get(self.reader.kind, 1)):
            told = f"is {len(parts)} conversations: expected {wanted} of a row of kind {self.reader.kind}"
            raise BadRow("wrong length", told)
        found = [
            Written(number, place, self.rendered(part, said), digest, extra, part.ids)
            for place, (part, said) in enumerate(zip(parts, contents, strict=True))
        ]
        if any(one.rendered.length > LONGEST for one in found):
            raise BadRow("too long", f"has more than {LONGEST} characters: expected less")
        return found

    def rendered(self, conversation: Conversation, contents: list[bytes] | None) -> Rendered | Formed:
        """One sequence as text with spans; `contents` is what `forms.plain` tells of it. Raises BadRow."""
        turns = conversation.turns
        if self.reader.ids:
            return _of_ids(conversation)
        said = next((number for number, turn in enumerate(turns) if turn.role == "text"), len(turns))
        if any(turn.role != "text" for turn in turns[said:]):
            raise BadRow("wrong type", "has raw text before turns with roles: expected it to stand alone or last")
        if not said:
            return self._raw(conversation)
        if self.forms is None:
            raise BadRow("no chat template", f"has turns with roles, and {self.reader.format} uses no chat template")
        if said == len(turns):
            prompt = self.reader.kind == "prompt"
            return (
                rendering.render(self.forms.template, conversation, prompt=True)
                if prompt
                else self.forms.render(conversation, contents)
            )
        asked = rendering.render(self.forms.template, Conversation(turns[:said], conversation.tools), prompt=True)
        return _followed(asked, turns, _texts(turns, said, conversation.between))

    def without_end(self, rendered: Rendered | Formed) -> int:
        """Turns that the model should write, but which nothing ends: it would not learn to stop there."""
        if isinstance(rendered, Formed):
            return rendered.form.without_end
        open_ended = self.reader.verbatim or self.reader.ids or self.reader.kind in ("stepwise", "prompt")
        last = rendered.spans[-1] if rendered.spans else None
        raw = not open_ended and last is not None and last.role == "text" and last.origin != ORIGIN_END
        return without_end(rendered.spans) + raw

    def _raw(self, conversation: Conversation) -> Rendered:
        """Raw text between the tokenizer's own begin token (if it adds one) and its end token (if it has one), which
        trusted data may have itself."""
        turns = conversation.turns
        pieces = _texts(turns, 0, conversation.between)
        if not self.reader.verbatim:
            begin, end = self.tokenizer.prefix, self.tokenizer.variables.get("eos_token", "")
            if self.trusted:
                pieces[0] = (pieces[0][0].removeprefix(begin), *pieces[0][1:])
            if conversation.between is None and self.reader.kind != "prompt":
                if self.trusted:
                    pieces[-1] = (pieces[-1][0].removesuffix(end), *pieces[-1][1:])
                pieces.append((end, ORIGIN_END, len(turns) - 1, None))
            pieces.insert(0, (begin, ORIGIN_TEMPLATE, NO_TURN, None))
        unwritten = ["tools"] if conversation.tools else []
        return Rendered("".join(text for text, *_ in pieces), rendering.spans(pieces, turns), unwritten)


def _texts(turns: list[Turn], first: int, between: str | None) -> list[Piece]:
    """Turns of raw text, from number `first` on, as pieces."""
    pieces: list[Piece] = []
    for number, turn in enumerate(turns[first:], first):
        text = turn.content or ""
        at = 0
        for end, train in turn.runs or [(len(text), turn.train)]:
            pieces.append((text[at:end], ORIGIN_CONTENT, number, train))
            at = end
        if between is not None and turn.train != TRAIN_NO:
            pieces.append((between, ORIGIN_END, number, None))
    return pieces


def _followed(found: Rendered, turns: list[Turn], pieces: list[Piece]) -> Rendered:
    """A render with more pieces after it."""
    at = found.spans[-1].end
    after = [span._replace(start=span.start + at, end=span.end + at) for span in rendering.spans(pieces, turns)]
    return Rendered(found.text + "".join(text for text, *_ in pieces), [*found.spans, *after], found.unwritten)


def _of_ids(conversation: Conversation) -> Rendered:
    """Spans over token ids."""
    (turn,) = conversation.turns
    assert conversation.ids is not None and turn.runs is not None
    starts = [0, *(end for end, _ in turn.runs[:-1])]
    spans = [
        Span(start, end, ORIGIN_CONTENT, 0, "text", train)
        for start, (end, train) in zip(starts, turn.runs, strict=True)
    ]
    return Rendered("", spans, [])


def _forget(turns: list[Turn], reasoning: Reasoning) -> None:
    """Leave the assistant's reasoning out, also where it stands in the content between `<think>` and `</think>`.

    `last` leaves that of the answers after the last question.
    """
    asked = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=0)
    for turn in turns[:asked] if reasoning == "last" else turns:
        if turn.role != "assistant":
            continue
        turn.reasoning = turn.reasoning_runs = None
        thought, end, answer = (turn.content or "").partition("</think>")
        if end and turn.content and thought.lstrip().startswith("<think>"):
            answer = answer.lstrip("\n")
            cut = len(turn.content) - len(answer)
            turn.content = answer
            turn.runs = [(place - cut, train) for place, train in turn.runs or [] if place > cut] or None


def identity(made: Conversation | Example) -> bytes:
    """16 bytes of sha256 over all that the row says: the same for every format and template, whatever of it trains.

    What comes with it, such as a label, is in the second half alone: it moves no text to or from the held-out rows.
    Raises BadRow when a text holds half a surrogate pair, which no UTF-8 can say.
    """
    return _identity(made, [plain(made)] if isinstance(made, Conversation) else [])


def _identity(made: Conversation | Example, contents: list[list[bytes] | None]) -> bytes:
    """The same, with what `forms.plain` tells of the parts."""
    if isinstance(made, Conversation):
        words = contents[0]
        if _is_cut(made):
            made = _in_one(made)
            words = plain(made)
        if any(turn.runs for turn in made.turns):
            words = plain(replace(made, turns=[replace(turn, runs=None) for turn in made.turns]))
        if words is not None:
            return _of_plain(made.turns, words)
        return _digest(_normal(made))
    said = [_normal(part) for part in made.parts]
    return _digest(said)[:8] + _digest([said, made.extra])[8:]


def _is_cut(conversation: Conversation) -> bool:
    """Whether raw text, which stands last, is in several turns with nothing between them: a prompt and its answer, or
    segments."""
    return conversation.between is None and [turn.role for turn in conversation.turns[-2:]] == ["text", "text"]


def _in_one(conversation: Conversation) -> Conversation:
    """The same, with its raw text as one turn, which is what it says."""
    turns = [turn for turn in conversation.turns if turn.role != "text"]
    text = "".join(turn.content or "" for turn in conversation.turns if turn.role == "text")
    return replace(conversation, turns=[*turns, Turn("text", text)])


def _digest(said: Any) -> bytes:
    try:
        normal = json.dumps(said, ensure_ascii=False, sort_keys=True, default=_as_text).encode()
    except UnicodeEncodeError as error:
        raise BadRow("not Unicode", f"holds half a surrogate pair: {error}") from error
    except (TypeError, RecursionError) as error:
        raise BadRow("wrong type", f"holds what JSON cannot say: {error}") from error
    return hashlib.sha256(normal).digest()[:16]


def _of_plain(turns: list[Turn], contents: list[bytes]) -> bytes:
    """The same for a conversation of which roles and contents are all that is said: JSON would be slow."""
    said: list[bytes] = []
    for turn, content in zip(turns, contents, strict=True):
        said += [f"{turn.role} {len(turn.content or '')} ".encode(), content]
    return hashlib.sha256(b"".join(said)).digest()[:16]


def _normal(conversation: Conversation) -> list[Any]:
    if _is_cut(conversation):
        conversation = _in_one(conversation)
    turns = [[t.role, t.content, t.reasoning, t.tool_calls, t.name, t.tool_call_id] for t in conversation.turns]
    rest = [] if conversation.ids is None else [conversation.ids]
    return [turns, conversation.tools, *rest]


def _extra(made: Conversation | Example) -> str:
    """What an objective needs besides, as JSON, in which times and decimals are text. Raises BadRow for what JSON
    cannot say."""
    if isinstance(made, Conversation) or not made.extra:
        return ""
    try:
        return _json(made.extra)
    except _UNSAYABLE:
        for name, value in made.extra.items():
            try:
                _json(value)
            except _UNSAYABLE as error:
                told = f"{name} holds what JSON cannot say ({error}): leave it out"
                raise BadRow("wrong type", told) from error
        raise BadRow("wrong type", "holds columns whose names are not all text") from None


_UNSAYABLE = (TypeError, ValueError, RecursionError)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False, default=_as_text)


def _as_text(value: Any) -> str:
    if (text := as_text(value)) is None:
        raise TypeError(kind_of(value))
    return text
