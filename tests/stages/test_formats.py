"""Formats: each kind of row becomes the conversation it means, and a bad one says where and why."""

import importlib
import json
import pkgutil
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, ClassVar

import pytest

import stages.formats
from stages import formats
from stages.errors import UserError
from stages.formats import BadRow, Conversation, Example, Format, Options, Turn, auto, find
from stages.marks import TRAIN_NO, TRAIN_UNSET, TRAIN_YES

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
    monkeypatch.setattr(stages.formats, "names", stages.formats.names.__wrapped__)  # a process looks once
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

    def test_tools_on_offer_however_they_are_written(self) -> None:
        schema = {"type": "object", "properties": {"city": {"type": "string"}}}
        function = {"name": "weather", "description": "Weather", "parameters": schema}
        tool = {"type": "function", "function": function}
        as_text = {**function, "parameters": json.dumps(schema)}
        written = [tool, function, {"type": "function", **function}, as_text, {"type": "function", "function": as_text}]
        for name, said in {"messages": "messages", "sharegpt": "conversations"}.items():
            speaks = {"role": "user", "content": "?"} if name == "messages" else {"from": "human", "value": "?"}
            for tools in (written, json.dumps(written)):
                made = reader(name)({said: [speaks], "tools": tools})
                assert made.tools == [tool] * len(written)
        for other in ({"type": "web_search"}, {"type": "custom", "custom": {"name": "x"}}):
            assert reader("messages")({"messages": [{"role": "user", "content": "?"}], "tools": [other]}).tools == [
                other
            ]
        with pytest.raises(BadRow, match=r"^tools\[0\]\.parameters is not JSON"):
            reader("messages")(
                {"messages": [{"role": "user", "content": "?"}], "tools": [{**as_text, "parameters": "{"}]}
            )

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

    @pytest.mark.parametrize("roles", [{}, {"client": "user"}])
    @pytest.mark.parametrize(("field", "name"), [("role", "name"), ("content", "thinking")])
    def test_a_field_with_the_name_of_another_one_is_read_once(
        self, field: str, name: str, roles: dict[str, str]
    ) -> None:
        plain = {"role": "user", "content": "hi"}
        row = {"messages": [{name if key == field else key: value for key, value in plain.items()}]}
        assert turns("messages", row, fields={field: name}, roles=roles) == [Turn("user", "hi")]

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

    @pytest.mark.parametrize("nothing", [{}, {"input": ""}, {"input": None}, {"input": "", "history": ""}])
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


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("sharegpt", {"conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "a"}]}),
        (
            "messages",
            {"messages": [{"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "a"}]},
        ),
        ("alpaca", {"instruction": "<image> What?", "output": "a"}),
    ],
)
def test_pictures_are_refused(name: str, row: Any) -> None:
    assert reader(name)(row | {"image": None})
    for column in ("image", "images"):
        with pytest.raises(BadRow, match=f"{column} holds text: only text can be learned"):
            reader(name)(row | {column: "a.jpg"})


def test_settings_of_the_template_are_refused() -> None:
    row = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {}}
    assert turns("messages", row)
    with pytest.raises(BadRow, match="gets no settings of a row's own"):
        turns("messages", row | {"chat_template_kwargs": {"reasoning_effort": "high"}})


def test_alpacas_input_is_the_column_that_says_something() -> None:
    row = {"instruction": "Sum up.", "input": None, "context": "Long.", "output": None, "response": "Short."}
    assert auto.recognise([row]) == ("alpaca", {"input": "context", "output": "response"})
    assert find("alpaca").recognises({**row, "input": "Other."}) is None


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("unpaired_preference", {"prompt": "q", "completion": "a", "label": "yes"}, "label is 'yes': expected true"),
        ("unpaired_preference", {"completion": "a", "label": True}, "prompt is missing"),
        (
            "unpaired_preference",
            {"completion": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}], "label": True},
            "completion ends with a turn of user",
        ),
        ("stepwise", {"prompt": "q", "completions": ["a"], "labels": [True, False]}, "2 labels: expected 1"),
        ("stepwise", {"prompt": "q", "completions": ["a"], "labels": [0.5]}, r"labels\[0\] is 0.5"),
        ("stepwise", {"prompt": "q", "completions": [None], "labels": [True]}, r"completions\[0\] is null"),
        ("prompt_only", {"prompt": [{"role": "assistant", "content": "a"}]}, "ends with the assistant's answer"),
        ("prompt_only", {"question": "q"}, "prompt is missing: expected text or messages; the row has question"),
        ("prompt_completion", {"prompt": "q", "completion": None}, "completion is missing"),
        ("input_output", {"segments": [{"text": "a"}]}, r"segments\[0\].label is missing"),
        ("pretokenized", {"input_ids": [1, "2"]}, r"input_ids\[1\] is '2': expected a whole number"),
        ("pretokenized", {"input_ids": [1, 2], "labels": [1]}, "labels has 1 numbers: expected 2"),
        ("pretokenized", {"input_ids": [1, 2], "labels": [1, 3]}, r"labels\[1\] is 3: expected 2"),
        ("pretokenized", {"input_ids": [1, -2]}, "holds -2 to 1"),
        ("pretokenized", {"input_ids": [1, 2], "completion_mask": [0, 2]}, "completion_mask holds other numbers"),
        ("pretokenized", {"input_ids": [1, 2], "seq_lengths": [1, 1]}, "it is 2 documents: expected one"),
        ("pretokenized", {"input_ids": [1, 2], "position_ids": [0, 0]}, "position_ids begins 2 times: expected one"),
    ],
)
def test_bad_rows_of_the_others_are_told(name: str, row: Any, says: str) -> None:
    with pytest.raises(BadRow, match=says):
        reader(name)(row)


@pytest.mark.parametrize(
    ("columns", "trained"),
    [
        ({}, [5, 6, 7, 8]),
        ({"completion_mask": [0, 1, 1, 1]}, [6, 7, 8]),
        ({"assistant_masks": [0, 1, 0, 1]}, [6, 8]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1]}, [8]),
        ({"completion_mask": [0, 0, 1, 1], "attention_mask": [0, 1, 1, 1]}, [7, 8]),
        ({"attention_mask": [0, 0, 1, 1], "position_ids": [0, 0, 0, 1]}, [7, 8]),
        ({"completion_mask": [0, 0, 1, 1], "labels": [-100, 6, -100, -100], "seq_lengths": [4]}, [6]),
    ],
)
def test_what_trains_of_ids_is_what_labels_or_else_the_masks_of_trl_say(columns: Any, trained: list[int]) -> None:
    made = reader("pretokenized")({"input_ids": [5, 6, 7, 8], **columns})
    ends = [0, *(end for end, _ in made.turns[0].runs)]
    runs = zip(ends, made.turns[0].runs, strict=False)
    assert [one for start, (end, train) in runs if train == TRAIN_YES for one in made.ids[start:end]] == trained


class TestKeptMessages:
    SAID: ClassVar = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]

    def test_a_prompt_stands_beside_its_other_columns(self) -> None:
        made = reader("prompt_only", {"keep_messages": True})({"prompt": self.SAID, "answer": "5"})
        assert isinstance(made, Example)
        assert made.extra == {"answer": "5", "prompt": self.SAID}

    def test_a_text_is_a_users_and_calls_are_kept(self) -> None:
        keep = reader("prompt_only", {"keep_messages": True}, fields={"prompt": "question"})
        assert keep({"question": "2 + 3?"}).extra == {"prompt": [{"role": "user", "content": "2 + 3?"}]}
        said = [*self.SAID, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}]
        assert keep({"question": said}).extra["prompt"][2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}

    @pytest.mark.parametrize(
        ("own", "row", "says"),
        [
            ({"wording": "text"}, {"question": "q"}, "question is raw text: keep_messages needs turns"),
            ({}, {"question": "q", "prompt": "other"}, "has a column prompt beside the one that is read"),
        ],
    )
    def test_what_cannot_be_kept_is_told(self, own: dict[str, Any], row: Any, says: str) -> None:
        with pytest.raises(BadRow, match=says):
            reader("prompt_only", {"keep_messages": True, **own}, fields={"prompt": "question"})(row)


class TestFields:
    TURNS: ClassVar = [
        {"role": "system", "text": "You are {who[name]}.", "optional": True},
        {"role": "user", "text": ["{q}: {facts[1]} {{x}}", "{q}"]},
        {"role": "assistant", "text": "{a}", "reasoning": "{why}", "train": True},
    ]

    def test_columns_are_put_onto_roles(self) -> None:
        row = {"who": {"name": "Ann"}, "q": "Sum", "facts": [1, 2], "a": 3, "why": "1+2"}
        assert turns("fields", row, {"turns": self.TURNS}) == [
            Turn("system", "You are Ann."),
            Turn("user", "Sum: 2 {x}"),
            Turn("assistant", "3", TRAIN_YES, reasoning="1+2"),
        ]
        bare = turns("fields", {"q": "Sum", "facts": [1], "a": {"n": 3}, "why": ""}, {"turns": self.TURNS})
        assert bare == [Turn("user", "Sum"), Turn("assistant", '{"n": 3}', TRAIN_YES)]

    @pytest.mark.parametrize("nothing", [None, "", [], {}, float("nan")])
    def test_the_first_text_is_taken_whose_columns_all_hold_something(self, nothing: Any) -> None:
        own = {"turns": [{"role": "user", "text": ["{q} Context: {context}", "{q}"]}]}
        assert turns("fields", {"q": "Sum", "context": nothing}, own) == [Turn("user", "Sum")]
        for value, said in ((0, "0"), (False, "false"), ([None], "[null]"), (" ", " ")):
            assert turns("fields", {"q": "Sum", "context": value}, own) == [Turn("user", f"Sum Context: {said}")]

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            (date(2024, 5, 1), "2024-05-01"),
            (datetime(2024, 5, 1, 9, 30, tzinfo=UTC), "2024-05-01 09:30:00+00:00"),
            (time(9, 30), "09:30:00"),
            (timedelta(hours=1), "1:00:00"),
            (Decimal("1.25"), "1.25"),
            (Decimal("0E-8"), "0.00000000"),
            ([{"on": date(2024, 5, 1), "paid": Decimal("1.50")}], '[{"on": "2024-05-01", "paid": "1.50"}]'),
        ],
    )
    def test_what_json_does_not_have_is_written_as_text(self, value: Any, said: str) -> None:
        assert turns("fields", {"d": value}, {"turns": [{"role": "user", "text": "{d}"}]}) == [Turn("user", said)]

    @pytest.mark.parametrize("value", [b"x", [b"x"], {"x": [b"x"]}])
    def test_what_has_no_text_is_told_with_its_column(self, value: Any) -> None:
        says = r"d\[x\]\[0\] holds a bytes: expected text, a number, .*; name no such column in options\.turns"
        with pytest.raises(BadRow, match=says):
            turns("fields", {"d": {"x": [value]}}, {"turns": [{"role": "user", "text": "{d[x][0]}"}]})

    def test_a_column_that_holds_nothing_is_told(self) -> None:
        with pytest.raises(BadRow, match=r"the assistant's '{a}' has a column that holds nothing; the row has q"):
            turns("fields", {"q": "Sum"}, {"turns": self.TURNS})

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ([{"role": "user", "text": "{q"}], "expected '}'"),
            ([{"role": "user", "text": "{q.__class__!r}"}], "is no column"),
            ([{"role": "user", "text": "{q:>9}"}], "is no column"),
            ([{"role": "user", "text": "{}"}], "is no column"),
            ([{"role": "usr", "text": "{q}"}], "role"),
            ([{"role": "user", "text": "{q}", "reasoning": "{r}"}], "reasoning is the assistant's"),
            ([{"role": "user", "text": "{q}"}, {"role": "text", "text": "{a}"}], "stand with no other role"),
            ([], "at least 1"),
        ],
    )
    def test_options_that_cannot_be_are_told_with_the_recipe(self, given: Any, says: str) -> None:
        with pytest.raises(UserError, match=says):
            formats.filled("fields", {"turns": given})


class TestLlamaFactory:
    def test_alpaca_with_ranking(self) -> None:
        row = {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4", "history": [["q", "a"]]}
        made = reader("llamafactory", {"ranking": True})(row)
        assert [[turn.content for turn in part.turns] for part in made.parts] == [
            ["q", "a", "Add.\n1 2", "3"],
            ["q", "a", "Add.\n1 2", "4"],
        ]

    def test_openai_names_and_a_kto_tag(self) -> None:
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        entry = {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}, "tags": tags}
        row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": False}
        made = formats.reader("llamafactory", {}, {}, entry)
        found = made.convert(row)
        assert made.kind == "unpaired_preference" and isinstance(found, Example) and found.extra == {"label": False}
        assert [turn.train for turn in found.parts[0].turns] == [TRAIN_NO, TRAIN_UNSET]

    def test_keys_that_say_where_the_data_lies_are_not_its_own(self) -> None:
        with pytest.raises(UserError, match="llamafactory has no 'file_name'"):
            formats.filled("llamafactory", {"file_name": "x.json"})


class TestFlags:
    """Training flags of parts and ranges within a turn."""

    def test_parts_and_ranges_become_runs(self) -> None:
        said = [{"type": "text", "text": "ab", "train": False}, {"type": "text", "text": "cd", "train": True}]
        ranges = [(0, 1, False), (2, 3, 1)]
        detail = [{"begin_offset": a, "end_offset": b, "train": train} for a, b, train in ranges]
        rows = [{"content": said}, {"content": "abcd", "train_detail": detail}]
        for row in rows:
            [turn] = turns("messages", {"messages": [{"role": "assistant", **row}]})
            assert (turn.content, turn.runs, turn.train) == ("abcd", [(2, TRAIN_NO), (4, TRAIN_YES)], TRAIN_YES)

    @pytest.mark.parametrize("last", [False, True])
    def test_a_range_or_part_that_ends_with_the_text_is_kept_whole(self, last: bool) -> None:
        """What follows it is empty: it once took the range before it along, and the text lost its end."""
        detail = [
            {"begin_offset": 0, "end_offset": 1, "train": not last},
            {"begin_offset": 2, "end_offset": 3, "train": last},
        ]
        parts = [{"text": "ab", "train": not last}, {"text": "cd", "train": last}, {"text": "", "train": last}]
        flags = {False: TRAIN_NO, True: TRAIN_YES}
        for row in ({"content": "abcd", "train_detail": detail}, {"content": parts}):
            [turn] = turns("messages", {"messages": [{"role": "assistant", **row}]})
            assert (turn.content, turn.runs) == ("abcd", [(2, flags[not last]), (4, flags[last])])

    @pytest.mark.parametrize(
        "entry", [{"begin_offset": 0, "end_offset": 4}, {"begin_offset": 2, "end_offset": 1}, {"end_offset": 1}, 3]
    )
    def test_ranges_that_do_not_fit_are_told(self, entry: Any) -> None:
        entry = {**entry, "train": True} if isinstance(entry, dict) else entry
        message = {"role": "assistant", "content": "abcd", "train_detail": [entry]}
        with pytest.raises(BadRow, match=r"messages\[0\].train_detail\[0\] is .*within the text's 4 characters"):
            turns("messages", {"messages": [message]})
