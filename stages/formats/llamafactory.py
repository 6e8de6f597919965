"""LLaMA-Factory's data, described as an entry of its `dataset_info.json` does: the options are that entry.

    convert:
      format: llamafactory
      options:
        formatting: sharegpt
        ranking: true
        columns: {messages: conversations, chosen: chosen, rejected: rejected}
        tags: {role_tag: from, content_tag: value, user_tag: human, assistant_tag: gpt}

    {"conversations": [{"from": "human", "value": "Hi."}],
     "chosen": {"from": "gpt", "value": "Hello."}, "rejected": {"from": "gpt", "value": "Go away."}}

Keys that say where the data lies (`file_name`, `hf_hub_url`) belong into `fetch.data`. Rows are conversations, with
`ranking` preferences, and with a column for `kto_tag` single answers with a label.
"""

from typing import Literal

from pydantic import Field

from stages.formats import BadRow, Conversation, Example, Format, Kind, Options, Row, Turn
from stages.formats.alpaca import history
from stages.formats.messages import offered
from stages.formats.sharegpt import turns as spoken
from stages.row_fields import list_at, shown, text_at, verdict
from stages.row_turns import prompt_of, split_answer
from stages.stage import StageConfig


class Columns(StageConfig):
    """What the data calls its columns."""

    prompt: str = "instruction"
    """The instruction (`formatting: alpaca`)."""
    query: str = "input"
    """What the instruction is about; follows it on a line of its own."""
    response: str = "output"
    """The answer."""
    history: str = "history"
    """Earlier questions and answers, in pairs."""
    messages: str = "conversations"
    """The list of messages (`formatting: sharegpt`)."""
    system: str = "system"
    """The system prompt."""
    tools: str = "tools"
    """The tools on offer, as JSON text."""
    chosen: str = "chosen"
    """With `ranking`: the preferred answer."""
    rejected: str = "rejected"
    """With `ranking`: the other answer."""
    kto_tag: str | None = None
    """Whether the answer is a good one, true or false."""


class Tags(StageConfig):
    """What messages call their fields and speakers (`formatting: sharegpt`)."""

    role_tag: str = "from"
    """The field that says who speaks."""
    content_tag: str = "value"
    """The field that says what is said."""
    user_tag: str = "human"
    """The user."""
    assistant_tag: str = "gpt"
    """The assistant."""
    observation_tag: str = "observation"
    """What a tool answered."""
    function_tag: str = "function_call"
    """The assistant calling a tool."""
    system_tag: str = "system"
    """The system prompt."""


class LlamaFactoryOptions(StageConfig):
    """An entry of `dataset_info.json`."""

    formatting: Literal["alpaca", "sharegpt"] = "alpaca"
    """Instructions with columns, or lists of messages."""
    ranking: bool = False
    """Whether rows hold a chosen and a rejected answer."""
    columns: Columns = Field(default_factory=Columns)
    """What the data calls its columns."""
    tags: Tags = Field(default_factory=Tags)
    """What messages call their fields and speakers."""


def kind(options: LlamaFactoryOptions) -> Kind:
    """What the rows are for."""
    return "preference" if options.ranking else "unpaired_preference" if options.columns.kto_tag else "conversation"


def convert(row: Row, options: Options) -> Conversation | Example:
    """One row to what it means. Raises BadRow."""
    entry: LlamaFactoryOptions = options.own
    columns = entry.columns
    named = _options(entry)
    asked = _asked(row, entry, named)
    if (system := text_at(row, columns.system, optional=True)) and asked[0].role != "system":
        asked = [Turn("system", system), *asked]
    tools = offered(row, named)
    if entry.ranking:
        if asked[-1].role == "assistant":
            told = f"{columns.messages} ends with the assistant's answer, which {columns.chosen} would follow"
            raise BadRow("answered already", f"{told}: expected a user's turn or a tool's there")
        sides = [_answer(row, name, named) for name in (columns.chosen, columns.rejected)]
        if sides[0] == sides[1]:
            names = f"{columns.chosen} and {columns.rejected}"
            raise BadRow("identical sides", f"{names} are the same: expected a preferred answer")
        return Example([Conversation(prompt_of(asked) + side, tools) for side in sides])
    answer = [] if entry.formatting == "sharegpt" else [Turn("assistant", text_at(row, columns.response))]
    if not columns.kto_tag:
        return Conversation(asked + answer, tools)
    if (good := verdict(row.get(columns.kto_tag))) is None:
        raise BadRow("wrong type", f"{columns.kto_tag} is {shown(row.get(columns.kto_tag))}: expected true or false")
    prompt, answer = split_answer(asked + answer, columns.messages)
    return Example([Conversation(prompt_of(prompt) + answer, tools)], {"label": good})


def _options(entry: LlamaFactoryOptions) -> Options:
    """The entry's names as those of `sharegpt`."""
    tags = entry.tags
    roles = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "tool",
        tags.function_tag: "function_call",
        tags.system_tag: "system",
    }
    return Options({"from": tags.role_tag, "value": tags.content_tag, "tools": entry.columns.tools}, roles)


def _asked(row: Row, entry: LlamaFactoryOptions, named: Options) -> list[Turn]:
    """What comes before the answer; with `formatting: sharegpt` the answer too, unless there are two."""
    columns = entry.columns
    if entry.formatting == "sharegpt":
        return spoken(list_at(row, columns.messages), columns.messages, named)
    question = [text_at(row, columns.prompt), text_at(row, columns.query, optional=True)]
    return [*history(row, columns.history), Turn("user", "\n".join(text for text in question if text))]


def _answer(row: Row, name: str, named: Options) -> list[Turn]:
    value = row.get(name)
    if isinstance(value, dict):
        answer = spoken([value], name, named)
        if answer[0].role != "assistant":
            raise BadRow("no answer", f"{name} is a turn of {answer[0].role}: expected the assistant's answer")
        return answer
    return [Turn("assistant", text_at(row, name))]


def _columns(options: LlamaFactoryOptions) -> set[str]:
    """Those that have other names than usual."""
    usual = {name: field.default for name, field in Columns.model_fields.items()}
    return {column for name, column in options.columns.model_dump().items() if column and column != usual[name]}


FORMAT = Format(convert, version=3, options=LlamaFactoryOptions, kind=kind, columns=_columns)
