"""Formats: each kind of row becomes the conversation it means, and a bad one says where and why."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest

import stages.formats
from stages import formats
from stages.errors import UserError
from stages.formats import BadRow, Conversation, Format, Options, Turn, find
from stages.tables import TRAIN_NO, TRAIN_UNSET, TRAIN_YES

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 3}}}


def reader(name: str, own: dict[str, Any] | None = None, **names: dict[str, str]) -> Callable[[Any], Any]:
    return formats.reader(name, names.get("fields", {}), names.get("roles", {}), own or {}).convert


def turns(name: str, row: Any, own: dict[str, Any] | None = None, **names: dict[str, str]) -> list[Turn]:
    made = reader(name, own, **names)(row)
    assert isinstance(made, Conversation)
    return made.turns


def test_every_file_in_the_folder_is_a_format() -> None:
    for module in pkgutil.iter_modules(stages.formats.__path__):
        assert isinstance(find(module.name), Format)
        assert importlib.import_module(f"stages.formats.{module.name}").__doc__


def test_unknown_format_lists_the_choices_and_the_nearest() -> None:
    with pytest.raises(UserError, match=r"alpaca, auto, completion, .*Did you mean alpaca\?"):
        find("alpacca")


def test_an_import_error_inside_a_format_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.setattr(stages.formats, "__path__", [*stages.formats.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        find("broken")


class TestMessages:
    def test_roles_contents_and_flags(self) -> None:
        found = turns(
            "messages",
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    {"role": "assistant", "content": "c", "weight": 0},
                    {"role": "assistant", "content": "d", "train": True, "reasoning_content": "hm"},
                    {"role": "assistant", "content": ""},
                ]
            },
        )
        assert [(t.role, t.content) for t in found] == [
            ("system", "Be brief."),
            ("user", "ab"),
            ("assistant", "c"),
            ("assistant", "d"),
            ("assistant", ""),
        ]
        assert [t.train for t in found] == [TRAIN_UNSET, TRAIN_UNSET, TRAIN_NO, TRAIN_YES, TRAIN_UNSET]
        assert found[3].reasoning == "hm"

    @pytest.mark.parametrize("arguments", [{"city": "Paris", "days": 3}, '{"city": "Paris", "days": 3}'])
    @pytest.mark.parametrize("envelope", [True, False])
    def test_tool_calls_however_they_are_written(self, arguments: Any, envelope: bool) -> None:
        function = {"name": "weather", "arguments": arguments}
        call = {"id": "call_1", "type": "function", "function": function} if envelope else function
        conversation = find("messages").convert(
            {
                "messages": [
                    {"role": "user", "content": "Will it rain?"},
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "no"},
                ],
                "tools": '[{"type": "function", "function": {"name": "weather"}}]',
            },
            Options(),
        )
        asked, answered = conversation.turns[1:]
        assert asked.content is None
        assert asked.tool_calls == [{**({"id": "call_1"} if envelope else {}), **CALL}]
        assert (answered.role, answered.tool_call_id, answered.name) == ("tool", "call_1", "weather")
        assert conversation.tools == [{"type": "function", "function": {"name": "weather"}}]

    def test_parts_of_text_reasoning_and_tool_calls(self) -> None:
        parts = [
            {"type": "reasoning", "value": "hm"},
            {"type": "tool_call", "value": '{"name": "weather", "arguments": {"city": "Paris", "days": 3}}'},
        ]
        said = [
            {"type": "thinking", "thinking": "so "},
            {"type": "thinking", "text": "so"},
            {"type": "text", "value": "No."},
        ]
        [called, answered] = turns(
            "messages", {"messages": [{"role": "assistant", "content": parts}, {"role": "assistant", "content": said}]}
        )
        assert called == Turn("assistant", None, reasoning="hm", tool_calls=[CALL])
        assert answered == Turn("assistant", "No.", reasoning="so so")

    def test_fields_and_roles_can_have_other_names(self) -> None:
        row = {"dialogue": [{"who": "client", "says": "hi"}, {"who": "agent", "says": "hello"}]}
        fields = {"messages": "dialogue", "role": "who", "content": "says"}
        found = turns("messages", row, fields=fields, roles={"client": "user", "agent": "assistant"})
        assert [(t.role, t.content) for t in found] == [("user", "hi"), ("assistant", "hello")]

    @pytest.mark.parametrize(
        ("row", "reason", "says"),
        [
            ({"text": "x"}, "missing field", r"messages is missing: expected a list; the row has text"),
            ({"messages": "x"}, "wrong type", "messages is text: expected a list"),
            ({"messages": []}, "empty conversation", "at least one turn"),
            ({"messages": ["x"]}, "wrong type", r"messages\[0\] is text: expected an object"),
            (
                {"messages": [{"role": "usr", "content": "x"}]},
                "unknown role",
                r"messages\[0\].role is 'usr'.*convert.roles",
            ),
            ({"messages": [{"content": "x"}]}, "unknown role", r"messages\[0\].role is None"),
            ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role", r"\['user'\]"),
            ({"messages": [{"role": "user"}]}, "missing field", r"messages\[0\].content is missing"),
            (
                {"messages": [{"role": "user", "content": 3}]},
                "wrong type",
                r"messages\[0\].content is a number: expected text",
            ),
            (
                {"messages": [{"role": "user", "content": "x", "train": "yes"}]},
                "wrong type",
                "expected true, false, 1 or 0",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
                "content that is not text",
                r"messages\[0\].content\[0\].type is 'image_url'",
            ),
            (
                {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{oops"}]}]},
                "tool call is not JSON",
                r"messages\[0\].tool_calls\[0\].arguments is not JSON",
            ),
            (
                {"messages": [{"role": "user", "content": "x"}], "tools": "[oops"},
                "tools are not JSON",
                "tools is not JSON",
            ),
        ],
    )
    def test_a_bad_row_is_told_where_and_why(self, row: Any, reason: str, says: str) -> None:
        with pytest.raises(BadRow, match=says) as error:
            turns("messages", row)
        assert error.value.reason == reason


class TestAlpaca:
    def test_instruction_input_and_output(self) -> None:
        row = {"instruction": "Add.", "input": "1 2", "output": "3"}
        assert [(t.role, t.content) for t in turns("alpaca", row)] == [("user", "Add.\n1 2"), ("assistant", "3")]

    @pytest.mark.parametrize("nothing", [{}, {"input": ""}, {"input": None}])
    def test_without_input(self, nothing: dict[str, Any]) -> None:
        assert turns("alpaca", {"instruction": "Hi.", "output": "", **nothing})[0].content == "Hi."

    def test_system_and_history_come_first(self) -> None:
        row = {"system": "s", "history": [["q1", "a1"]], "instruction": "q2", "output": "a2"}
        assert [t.content for t in turns("alpaca", row)] == ["s", "q1", "a1", "q2", "a2"]

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"instruction": "x"}, "output is missing: expected text; the row has instruction"),
            ({"instruction": 1, "output": "x"}, "instruction is a number: expected text"),
            ({"instruction": "x", "output": "y", "history": [["q"]]}, r"history\[0\] must be a pair"),
        ],
    )
    def test_a_bad_row_is_told(self, row: Any, says: str) -> None:
        with pytest.raises(BadRow, match=says):
            turns("alpaca", row)


class TestShareGpt:
    def test_speakers_have_many_names(self) -> None:
        row = {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "chatgpt", "value": "c"},
            ],
        }
        assert [(t.role, t.content) for t in turns("sharegpt", row)] == [
            ("system", "s"),
            ("user", "a"),
            ("assistant", "b"),
            ("assistant", "c"),
        ]

    def test_function_calls_and_observations(self) -> None:
        said = [
            {"from": "human", "value": "Will it rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris", "days": 3}}'},
            {"from": "observation", "value": "no"},
        ]
        found = turns("sharegpt", {"conversations": said})
        assert found[1] == Turn("assistant", None, tool_calls=[CALL])
        assert (found[2].role, found[2].content) == ("tool", "no")

    @pytest.mark.parametrize(
        ("said", "says"),
        [
            ({"from": "function_call", "value": "weather(Paris)"}, r"conversations\[0\].value is not JSON"),
            ({"from": "nobody", "value": "x"}, r"conversations\[0\].from is 'nobody'"),
            ({"from": "human"}, r"conversations\[0\].value is missing"),
        ],
    )
    def test_a_bad_row_is_told(self, said: Any, says: str) -> None:
        with pytest.raises(BadRow, match=says):
            turns("sharegpt", {"conversations": [said]})


def test_completion_is_one_turn_of_text() -> None:
    assert turns("completion", {"text": "Once."}) == [Turn("text", "Once.")]
    assert turns("completion", {"body": "Once."}, fields={"text": "body"}) == [Turn("text", "Once.")]
    assert not find("completion").templated
    with pytest.raises(BadRow, match="text is missing"):
        turns("completion", {"txt": "Once."})
