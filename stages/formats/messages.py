"""OpenAI's chat format: messages with roles, and the tools on offer.

    {"messages": [{"role": "user", "content": "Will it rain?"},
                  {"role": "assistant", "content": "No.", "train": true}], "tools": [...]}

A turn may also carry `reasoning_content` (or `thinking`, `reasoning`), `tool_calls`, `tool_call_id`, `name`, and a
training flag of its own: `train` (or `training`, or ms-swift's `loss`; true or false) or, as OpenAI's fine-tuning files
say it, `weight` (1 or 0; of others than the assistant only 0 counts). Content may be a list of parts: `text`,
`reasoning` (or `thinking`) and `tool_call` parts are read, each with a `train` of its own if it likes; pictures and
sound are not. `train_detail` flags ranges of characters, both ends counted: `[{"begin_offset": 0, "end_offset": 8,
"train": false}, ...]`; what no range covers does not train, and none does in a turn whose own flag is false. A `system`
column is the first turn.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from stages.formats import ROLES, BadRow, Conversation, Format, Options, Row, Runs, Turn
from stages.marks import TRAIN_NO, TRAIN_UNSET, TRAIN_YES
from stages.row_fields import decoded, json_at, kind_of, list_at, object_at, shown, text_at, verdict
from stages.row_tool_calls import called, said_once, tool_calls

MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
"""Columns that hold what this is not for."""


class Names(NamedTuple):
    """What the rows call the fields of a message."""

    role: str = "role"
    content: str = "content"
    flags: tuple[str, ...] = ("train", "training", "weight")
    details: tuple[str, ...] = ("train_detail", "training_detail")
    reasoning: tuple[str, ...] = ("reasoning_content", "thinking", "reasoning")
    tool_calls: str = "tool_calls"
    name: str = "name"
    tool_call_id: str = "tool_call_id"


STANDARD = Names()


def names(options: Options) -> Names:
    """The names that `options` gives the fields of a message."""
    if not options.fields:
        return STANDARD
    at = options.fields
    return Names(
        options.name("role"),
        options.name("content"),
        (at["train"], options.name("weight")) if "train" in at else (*STANDARD.flags[:2], options.name("weight")),
        (at["train_detail"],) if "train_detail" in at else STANDARD.details,
        (at["reasoning_content"],) if "reasoning_content" in at else STANDARD.reasoning,
        *map(options.name, ("tool_calls", "name", "tool_call_id")),
    )


def convert(row: Row, options: Options) -> Conversation:
    """One row to one conversation. Raises BadRow."""
    field = options.name("messages")
    found = turns(list_at(row, field, as_text=True), field, options)
    return Conversation(with_system(row, found, options), offered(row, options))


def turns(messages: list[Any], place: str, options: Options) -> list[Turn]:
    """A list of messages as turns. `place` is where it stands. Raises BadRow."""
    called = names(options)
    if not options.roles and (texts := _texts(messages, called)):
        return texts
    found: list[Turn] = []
    for message in messages:
        try:
            found.append(turn(message, options, called))
        except BadRow as error:
            raise error.inside(f"{place}[{len(found)}]") from error
    return found


def _texts(messages: list[Any], at: Names) -> list[Turn] | None:
    """The turns of messages that hold a known role and a text and nothing else, as most do; else None."""
    role, content = at.role, at.content
    try:
        found = [
            Turn(ROLES[said[role]], text)
            for said in messages
            if len(said) == 2 and isinstance(text := said[content], str)
        ]
    except (KeyError, TypeError):  # no object, no such field, or a role of another kind: `turn` tells
        return None
    return found if len(found) == len(messages) else None


def turn(message: Any, options: Options, at: Names = STANDARD) -> Turn:
    """One message of the list. Raises BadRow."""
    message = object_at(message)
    said = message.get(at.role)
    if isinstance(said, str) and options.roles.get(said, said) == "function_call":
        return _calling(message, at)
    role = ROLES.get(said) if isinstance(said, str) and not options.roles else None
    if role is None:
        try:
            role = options.role(said)
        except BadRow as error:
            raise error.inside(at.role) from error
    content = message.get(at.content)
    if len(message) == 2 and isinstance(content, str):
        return Turn(role, content)
    found = Turn(role, None, _flag_of(message, role, at))
    calls: list[dict[str, Any]] = []
    if isinstance(content, list):
        try:
            text, thought, calls = parts(content, found.train)
        except BadRow as error:
            raise error.inside(at.content) from error
        if text.said or not calls:
            found.content, found.runs = text.joined()
        if thought.said:
            found.reasoning, found.reasoning_runs = thought.joined()
    elif isinstance(content, str):
        found.content = content
    elif content is not None:
        raise BadRow("wrong type", f"{at.content} is {kind_of(content)}: expected text or a list of text parts")
    _reasoning(message, found, at)
    calls = said_once(tool_calls(message.get(at.tool_calls), at.tool_calls), calls, at.content)
    if message.get("function_call") is not None:  # what OpenAI had before tool_calls
        calls = said_once(calls, tool_calls([message["function_call"]], "function_call"), "function_call")
    found.tool_calls = calls or None
    if not found.content and not calls:
        found.content = text_at(message, "refusal", optional=True) or found.content
        if found.content is None:
            raise BadRow("missing field", f"{at.content} is missing: expected text, or {at.tool_calls}")
    found.name = text_at(message, at.name, optional=True) or None
    found.tool_call_id = text_at(message, at.tool_call_id, optional=True) or None
    _details(message, found, at)
    if found.runs and found.train == TRAIN_UNSET:
        found.train = found.runs[-1][1]  # the end of the turn goes with what stands before it
    return found


def _calling(message: Mapping[str, Any], at: Names) -> Turn:
    """A turn whose content is tool calls as JSON. Raises BadRow."""
    text_at(message, at.content)
    calls = called(message, at.content)
    if not calls:
        raise BadRow("missing field", f"{at.content} has no tool call in it")
    found = Turn("assistant", None, flag(message, at.flags), tool_calls=calls)
    _reasoning(message, found, at)
    return found


def _flag_of(message: Mapping[str, Any], role: str, at: Names) -> int:
    """The training flag of a whole message. A `weight` is a factor of what the assistant's loss is, so 1 has nobody
    else's words learned: data sets give it to every message."""
    *flags, weight = at.flags
    found = flag(message, flags)
    if found == TRAIN_UNSET and isinstance(message.get("loss"), bool):  # a number there is a figure, not a flag
        return TRAIN_YES if message["loss"] else TRAIN_NO
    if found == TRAIN_UNSET:
        found = flag(message, (weight,))
        return TRAIN_UNSET if found == TRAIN_YES and role != "assistant" else found
    return found


def flag(said: Mapping[str, Any], flags: Iterable[str]) -> int:
    """The training flag of a message or a part of one, as TRAIN_*. Raises BadRow."""
    for name in flags:
        if name in said and (value := said[name]) is not None:
            if isinstance(value, str | list | dict) or value not in (0, 1):
                raise BadRow("wrong type", f"{name} is {shown(value)}: expected true, false, 1 or 0")
            return TRAIN_YES if value else TRAIN_NO
    return TRAIN_UNSET


_TEXT = {"text", "input_text", "output_text", "refusal"}
_KINDS = _TEXT | {"reasoning", "thinking", "tool_call"}


def parts(content: list[Any], train: int) -> "tuple[Pieces, Pieces, list[dict[str, Any]]]":
    """Content parts by kind: text, reasoning, tool calls. Raises BadRow for pictures and the like."""
    text, reasoning = Pieces(train), Pieces(train)
    calls: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        try:
            part = object_at(part)
            kind = part.get("type", "text")
            if not isinstance(kind, str) or kind not in _KINDS:
                expected = "expected text, reasoning or tool_call"
                raise BadRow("content that is not text", f"type is {shown(kind)}: {expected}")
            field = next((name for name in (kind, "value", "text", "content") if name in part), "text")
            if kind == "tool_call":
                calls += called(part, field)
            else:
                (text if kind in _TEXT else reasoning).add(text_at(part, field), flag(part, STANDARD.flags))
        except BadRow as error:
            raise error.inside(f"[{number}]") from error
    return text, reasoning, calls


class Pieces:
    """Texts that are put together, and their training flags."""

    def __init__(self, train: int) -> None:
        self.said: list[str] = []
        self.flags: list[int] = []
        self.train = train

    def add(self, text: str, train: int) -> None:
        """One text with its own flag; unset means the turn's."""
        self.said.append(text)
        self.flags.append(self.train if train == TRAIN_UNSET else train)

    def joined(self) -> tuple[str, Runs | None]:
        """The text, and its runs where they differ from the turn's flag."""
        if all(train == self.train for train in self.flags):
            return "".join(self.said), None
        return "".join(self.said), runs(zip(map(len, self.said), self.flags, strict=True))


def runs(lengths: Iterable[tuple[int, int]]) -> Runs:
    """(length, flag) from left to right as runs: empty ones left out, equal neighbours joined."""
    found: Runs = []
    end = 0
    pieces = list(lengths)
    for length, train in [piece for piece in pieces if piece[0]] or pieces[:1]:
        end += length
        if found and found[-1][1] == train:
            found.pop()
        found.append((end, train))
    return found


def _reasoning(message: Mapping[str, Any], found: Turn, at: Names) -> None:
    """Reasoning that stands beside the content, as text or as parts."""
    for name in at.reasoning:
        if not (value := message.get(name)):
            continue
        inner: Runs | None = None
        if isinstance(value, list):
            try:
                text, thought, calls = parts(value, found.train)
            except BadRow as error:
                raise error.inside(name) from error
            if calls or (text.said and thought.said):
                raise BadRow("wrong type", f"{name} has parts of several kinds: expected text")
            value, inner = (text if text.said else thought).joined()
        else:
            value = text_at(message, name)
        if found.reasoning is None:
            found.reasoning, found.reasoning_runs = value, inner
        elif found.reasoning != value:
            raise BadRow("said twice", f"{name} says something else than the other reasoning: expected one of them")


def _details(message: Mapping[str, Any], found: Turn, at: Names) -> None:
    """Flags of ranges of characters, as Axolotl's data has them."""
    for field in at.details:
        if (value := message.get(field)) is None:
            continue
        if not isinstance(value, list) or found.content is None or found.runs:
            raise BadRow("wrong type", f"{field} is {kind_of(value)}: expected a list, beside content that is text")
        lengths, end = [], 0
        for number, entry in enumerate(value):
            entry = entry if isinstance(entry, dict) else {}
            begin, last = entry.get("begin_offset"), entry.get("end_offset")
            train = flag(entry, STANDARD.flags)
            begin, last = (offset if isinstance(offset, int) else -1 for offset in (begin, last))
            if not end <= begin <= last < len(found.content) or train == TRAIN_UNSET:
                raise BadRow(
                    "wrong type",
                    f"{field}[{number}] is {shown(value[number])}: expected begin_offset, end_offset and train, in "
                    f"order and within the text's {len(found.content)} characters",
                )
            lengths += [(begin - end, TRAIN_NO), (last + 1 - begin, train)]
            end = last + 1
        if found.train != TRAIN_NO:  # beside ranges it cannot mean the rest of the turn: that never trains
            found.runs = runs([*lengths, (len(found.content) - end, TRAIN_NO)])
        return


def refuse_media(row: Row) -> None:
    """Raises BadRow for a row with pictures or sound."""
    if not MEDIA.isdisjoint(row):
        for name in sorted(MEDIA & row.keys()):
            if row[name]:
                raise BadRow("content that is not text", f"{name} holds {kind_of(row[name])}: only text can be learned")


def offered(row: Row, options: Options) -> list[Any] | None:
    """The tools on offer: a list, or a list written as JSON text. Refuses pictures and sound, and settings of the chat
    template, which TRL hands to it row by row. Raises BadRow."""
    refuse_media(row)
    if settings := row.get("chat_template_kwargs"):
        told = f"chat_template_kwargs is {shown(settings)}: a chat template gets no settings of a row's own"
        raise BadRow("settings of the template", f"{told}. Take the column out, or write them into convert.template")
    place = options.name("tools")
    value = row.get(place)
    if value is None and row.get("functions"):  # what OpenAI had before tools
        place = "functions"
        value = [{"type": "function", "function": function} for function in list_at(row, place)]
    if isinstance(value, str):
        try:
            value = json_at(value, "tools are not JSON") if value.strip() else None
        except BadRow as error:
            raise error.inside(place) from error
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{place} is {kind_of(value)}: expected a list of tools")
    found = []
    for tool in value:
        try:
            found.append(_tool(tool))
        except BadRow as error:
            raise error.inside(f"{place}[{len(found)}]") from error
    return found


def _tool(value: Any) -> dict[str, Any]:
    """One tool as whoever asks a model hands it over, `{"type": "function", "function": {...}}`: data also has it
    without the envelope, and its parameters as JSON text, where a column cannot hold schemas that differ."""
    tool = object_at(value)
    function = tool.get("function")
    if function is None and isinstance(tool.get("name"), str):
        function = {name: told for name, told in tool.items() if name not in ("type", "function")}
        tool = {"type": "function", "function": function}
    if isinstance(function, dict) and isinstance(schema := function.get("parameters"), str):
        try:
            function = {**function, "parameters": json_at(schema, "tools are not JSON")}
        except BadRow as error:
            raise error.inside("parameters") from error
        tool = {**tool, "function": function}
    return tool


def with_system(row: Row, found: list[Turn], options: Options) -> list[Turn]:
    """The turns after the row's `system` column, if it says something. Raises BadRow when the turns say otherwise."""
    field = options.name("system")
    if not row.get(field) or not (system := text_at(row, field)):
        return found
    if found and found[0].role == "text":
        raise BadRow(
            "system before raw text",
            f"{field} says something, and raw text has no system prompt: put it into the text, or name another column "
            "with fields",
        )
    if found and found[0].role == "system":
        if (found[0].content or "").strip() == system.strip():
            return found
        raise BadRow("said twice", f"{field} says something else than the first turn: expected one system prompt")
    return [Turn("system", system), *found]


def recognises(row: Row) -> Mapping[str, str] | None:
    """Rows with a list of `role` and `content` in one of the columns that public data has it in."""
    found = [column for column in COLUMNS if chats(decoded(row.get(column)), "role", "content")]
    if len(found) != 1 or verdict(row.get("kto_tag")) is not None:
        return None
    if sides_of(row) and asks(decoded(row[found[0]])):
        return None
    return {} if found == ["messages"] else {"messages": found[0]}


COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")


SIDES = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
"""The columns that public data has a better and a worse answer in."""


def sides_of(row: Row) -> tuple[str, str] | None:
    """Where a row has a better and a worse answer, if it does."""
    there = (pair for pair in SIDES if all(isinstance(row.get(name), str | list | dict) for name in pair))
    return next(there, None)


def asks(value: Any, role: str = "role", content: str = "content") -> bool:
    """Whether a value is a list of messages that ends where the assistant is to answer a user or a tool."""
    last = value[-1][role] if chats(value, role, content) else None
    return isinstance(last, str) and ROLES.get(last) in ("user", "tool")


def chats(value: Any, role: str, content: str) -> bool:
    """Whether a value is a list of messages with these names of role and content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(said, dict) and role in said and (content in said or "tool_calls" in said) for said in value)
    )


MESSAGE_FIELDS = frozenset(
    {"role", "content", "train", "train_detail", "weight", "reasoning_content", "tool_calls", "name", "tool_call_id"}
)

FORMAT = Format(
    convert,
    version=4,
    fields=MESSAGE_FIELDS | {"messages", "system", "tools"},
    recognises=recognises,
)
