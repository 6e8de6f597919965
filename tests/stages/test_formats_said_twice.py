"""What a row says in two places, or in one that a wording has no room for: learned once, kept, or a bad row."""

import json
from typing import Any

import pytest

from stages.formats import BadRow
from tests.stages.test_formats import reader, turns


def test_a_tool_call_that_is_said_in_two_places_is_learned_once() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    asked = {"role": "user", "content": "q"}
    for twice in (
        {**said, "function_call": call["function"]},
        {**said, "content": [{"type": "tool_call", "tool_call": json.dumps(call["function"])}]},
    ):
        found = turns("messages", {"messages": [asked, twice]})
        assert found == turns("messages", {"messages": [asked, said]})
    other = {**said, "function_call": {"name": "look", "arguments": {"x": 2}}}
    with pytest.raises(BadRow, match="function_call has other tool calls"):
        turns("messages", {"messages": [asked, other]})


@pytest.mark.parametrize("content", [None, ""])
def test_a_refusal_stands_where_nothing_else_is_said(content: Any) -> None:
    said = {"role": "assistant", "content": content, "refusal": "I will not."}
    [_, found] = turns("messages", {"messages": [{"role": "user", "content": "q"}, said]})
    assert found.content == "I will not."


def test_a_turn_of_tool_calls_keeps_its_reasoning() -> None:
    call = {"from": "function_call", "value": '{"name": "look", "arguments": {}}', "reasoning_content": "I must."}
    [_, found] = turns("sharegpt", {"conversations": [{"from": "human", "value": "q"}, call]})
    assert (found.reasoning, len(found.tool_calls or [])) == ("I must.", 1)


@pytest.mark.parametrize("name", ["prompt_completion", "preference"])
def test_raw_text_has_no_system_prompt(name: str) -> None:
    row = {"prompt": "The sky", "completion": " is blue.", "chosen": " is blue.", "rejected": " is red.", "system": "x"}
    read = reader(name, {"wording": "text"})
    with pytest.raises(BadRow, match="system says something, and raw text has no system prompt"):
        read(row)
    assert read({**row, "system": ""})


def test_a_call_has_its_arguments_as_parameters_or_under_no_other_name() -> None:
    def call(**said: Any) -> Any:
        row = {"messages": [{"role": "assistant", "tool_calls": [{"name": "weather", **said}]}]}
        (turn,) = reader("messages")(row).turns
        return turn.tool_calls[0]["function"]["arguments"]

    assert call(parameters={"city": "Oslo"}) == call(arguments={"city": "Oslo"}) == {"city": "Oslo"}
    assert call() == call(arguments=None, type="function", input=None) == {}
    with pytest.raises(BadRow, match=r"tool_calls\[0\] has no arguments, but input: expected `arguments`"):
        call(input={"city": "Oslo"})
