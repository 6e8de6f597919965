"""Formats of judged answers, and of answers to a prompt: it is asked once, two answers part, a label is a label."""

import math
from typing import Any, ClassVar

import pytest

from stages.errors import UserError
from stages.formats import BadRow, Example, auto, find
from stages.marks import TRAIN_NO, TRAIN_UNSET
from tests.stages.test_formats import reader


class TestPreference:
    ASKED: ClassVar = [{"role": "user", "content": "q"}]
    OTHER: ClassVar = [{"role": "user", "content": "p"}]
    MORE: ClassVar = [{"role": "system", "content": "s"}, *ASKED]
    SAID: ClassVar = {"role": "assistant", "content": "a"}

    @staticmethod
    def sides(row: Any, **own: Any) -> list[list[tuple[str, str | None, int]]]:
        made = reader("preference", own)(row)
        assert isinstance(made, Example)
        return [[(turn.role, turn.content, turn.train) for turn in part.turns] for part in made.parts]

    def test_the_prompt_is_what_both_begin_with_however_it_is_written(self) -> None:
        chats = [[*self.ASKED, {"role": "assistant", "content": text}] for text in "ab"]
        rows: list[Any] = [
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": self.ASKED, "chosen": chats[0][1:], "rejected": chats[1][1:]},
            {"prompt": self.ASKED, "chosen": chats[0], "rejected": chats[1]},
            {"prompt": "q", "chosen": chats[0], "rejected": chats[1]},
            {"chosen": chats[0], "rejected": chats[1]},
            {"prompt": self.ASKED, "chosen": chats[0][1], "rejected": {"from": "gpt", "value": "b"}},
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        ]
        wanted = [[("user", "q", TRAIN_NO), ("assistant", text, TRAIN_UNSET)] for text in "ab"]
        assert [self.sides(row) for row in rows] == [wanted] * len(rows)

    def test_a_prompt_that_the_answers_repeat_in_a_longer_conversation_is_said_once(self) -> None:
        system, earlier = {"role": "system", "content": "s"}, [{"role": "user", "content": "p"}]
        earlier += [{"role": "assistant", "content": "x"}]
        for prompt, begun in [
            ("q", [system, *self.ASKED]),
            ("q ", [*self.ASKED]),
            ("", [*self.ASKED]),
            ("q", [*earlier, *self.ASKED]),
            ([system], [*self.ASKED]),
            ([system, *self.ASKED], [*self.ASKED]),
        ]:
            chosen, rejected = ([*begun, {"role": "assistant", "content": text}] for text in "ab")
            sides = self.sides({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            first = [system] if prompt and isinstance(prompt, list) else []
            said = [turn["content"] for turn in [*first, *begun]]
            assert [[content for _, content, _ in side] for side in sides] == [[*said, "a"], [*said, "b"]]
            assert all(train == TRAIN_NO for side in sides for _, _, train in side[:-1])

    def test_what_both_say_first_is_no_answer_whether_or_not_a_prompt_stands_by_itself(self) -> None:
        more = [{"role": "assistant", "content": "s"}, {"role": "user", "content": "r"}]
        chosen, rejected = ([*self.ASKED, *more, {"role": "assistant", "content": text}] for text in "ab")
        rows: list[Any] = [
            {"chosen": chosen, "rejected": rejected},
            {"prompt": "q", "chosen": chosen, "rejected": rejected},
            {"prompt": "q", "chosen": chosen[1:], "rejected": rejected[1:]},
            {"prompt": chosen[:-1], "chosen": chosen, "rejected": rejected},
            {"prompt": chosen[:-1], "chosen": "a", "rejected": "b"},
        ]
        sides = [self.sides(row) for row in rows]
        assert sides == sides[:1] * len(rows)
        assert [train for _, _, train in sides[0][0]] == [TRAIN_NO, TRAIN_NO, TRAIN_NO, TRAIN_UNSET]

    @pytest.mark.parametrize("margin", [1.5, "1.5", " 1.5"])
    def test_a_margin_may_be_text_as_a_csv_has_it(self, margin: Any) -> None:
        made = reader("preference")({"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin})
        assert isinstance(made, Example) and made.extra == {"margin": 1.5}

    @pytest.mark.parametrize("margin", [None, math.nan, "", " "])
    def test_a_margin_may_be_missing_as_pandas_and_csv_have_it(self, margin: Any) -> None:
        made = reader("preference")({"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin})
        assert isinstance(made, Example) and not made.extra

    @pytest.mark.parametrize("prompt", [None, "", " "])
    def test_beside_dialogues_a_blank_prompt_is_none(self, prompt: Any) -> None:
        row = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
        assert self.sides({**row, "prompt": prompt}) == self.sides(row)
        assert [role for role, *_ in self.sides(row)[0]] == ["user", "assistant"]
        if prompt is not None:  # but a question that says nothing may be meant
            assert self.sides({"prompt": prompt, "chosen": "a", "rejected": "b"})[0][0] == ("user", prompt, TRAIN_NO)

    def test_messages_that_a_user_ends_are_the_prompt(self) -> None:
        row: dict[str, Any] = {"messages": self.ASKED, "chosen": self.SAID, "rejected": {**self.SAID, "content": "b"}}
        assert auto.recognise([row]) == ("preference", {"prompt": "messages"})
        ended = {**row, "messages": [*self.ASKED, self.SAID], "prompt": "q"}
        with pytest.raises(UserError, match="could be messages or preference"):
            auto.recognise([ended])

    def test_answers_of_several_turns_part_where_they_differ(self) -> None:
        more = [{"role": "assistant", "content": "s"}, {"role": "user", "content": "r"}]
        sides = self.sides(
            {
                "chosen": [*self.ASKED, *more, {"role": "assistant", "content": "a"}],
                "rejected": [*self.ASKED, {"role": "assistant", "content": "b"}],
            }
        )
        assert [train for _, _, train in sides[0]] == [TRAIN_NO, TRAIN_UNSET, TRAIN_UNSET, TRAIN_UNSET]
        assert [train for _, _, train in sides[1]] == [TRAIN_NO, TRAIN_UNSET]

    def test_raw_text(self) -> None:
        wanted = [[("text", "The sky", TRAIN_NO), ("text", text, TRAIN_UNSET)] for text in (" is blue", " is green")]
        given: list[Any] = [
            {"prompt": "The sky", "chosen": " is blue", "rejected": " is green"},
            {"chosen": "The sky is blue", "rejected": "The sky is green"},
        ]
        assert self.sides(given[0], wording="text") == wanted
        (_, one, _), (_, two, _) = self.sides(given[1], wording="text")[0]
        assert (one, two) == ("The sky is", " blue")

    @pytest.mark.parametrize(
        ("row", "reason", "says"),
        [
            ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical sides", "chosen and rejected are the same"),
            ({"chosen": "a", "rejected": "b"}, "missing field", "prompt is missing"),
            ({"prompt": "q", "chosen": "a"}, "missing field", "rejected is missing"),
            ({"prompt": "q", "chosen": 3, "rejected": "b"}, "wrong type", "chosen is a number"),
            ({"prompt": "q", "chosen": [], "rejected": "b"}, "empty conversation", "chosen is empty"),
            ({"prompt": ASKED, "chosen": ASKED, "rejected": "b"}, "no answer", "chosen says nothing after the prompt"),
            (
                {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"},
                "wrong type",
                "margin is 'x': expected a number",
            ),
            ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.inf}, "wrong type", "margin is inf"),
            ({"prompt": "p", "chosen": [*ASKED, SAID], "rejected": "b"}, "two prompts", "chosen begins with a turn of"),
            ({"prompt": [*ASKED, SAID], "chosen": "a", "rejected": "b"}, "answered already", "before chosen ends with"),
            ({"prompt": "q", "chosen": [*ASKED, SAID], "rejected": [*MORE, SAID]}, "two prompts", "do not begin alike"),
            ({"chosen": [*ASKED, SAID], "rejected": [*OTHER, SAID]}, "two prompts", "chosen goes on with a turn of us"),
        ],
    )
    def test_a_bad_row_is_told(self, row: Any, reason: str, says: str) -> None:
        with pytest.raises(BadRow, match=says) as error:
            reader("preference")(row)
        assert error.value.reason == reason


class TestLlamaFactory:
    ASKED: ClassVar[dict[str, str]] = {"from": "human", "value": "q"}
    SAID: ClassVar[dict[str, str]] = {"from": "gpt", "value": "a"}

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"chosen": {**ASKED, "value": "c"}}, "chosen is a turn of user: expected the assistant's answer"),
            ({"rejected": {"from": "system", "value": "c"}}, "rejected is a turn of system"),
            ({"conversations": [ASKED, SAID]}, "conversations ends with the assistant's answer, which chosen would"),
        ],
    )
    def test_two_answers_are_the_assistants_and_to_a_question(self, changes: Any, says: str) -> None:
        row = {"conversations": [self.ASKED], "chosen": self.SAID, "rejected": {**self.SAID, "value": "b"}}
        read = reader("llamafactory", {"ranking": True, "formatting": "sharegpt"})
        assert [[turn.role for turn in part.turns] for part in read(row).parts] == [["user", "assistant"]] * 2
        with pytest.raises(BadRow, match=says):
            read({**row, **changes})

    def test_a_label_that_is_none_is_shown(self) -> None:
        with pytest.raises(BadRow, match="label is 'yes': expected true or false"):
            reader("llamafactory", {"columns": {"kto_tag": "label"}})(
                {"instruction": "q", "output": "a", "label": "yes"}
            )


def test_of_a_judged_completion_the_last_turn_is_the_answer() -> None:
    talk = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    turns = [{"role": role, "content": text} for role, text in talk]
    rows: list[Any] = [
        {"completion": turns},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"prompt": "q", "completion": turns},
        {"prompt": turns[:3], "completion": "b"},
    ]
    for row in rows:
        made = reader("unpaired_preference")({**row, "label": True})
        assert isinstance(made, Example)
        found = [(turn.role, turn.content, turn.train) for turn in made.parts[0].turns]
        assert found == [(role, text, TRAIN_UNSET if text == "b" else TRAIN_NO) for role, text in talk]


@pytest.mark.parametrize("column", ["question", "instruction"])
def test_a_prompt_under_another_name(column: str) -> None:
    row = {"system": "s", column: "q", "completion": "a", "label": 1}
    assert auto.recognise([row]) == ("unpaired_preference", {"prompt": column})
    with pytest.raises(
        BadRow, match=r"prompt is missing.*also has system, other: is it there\? convert.fields: {prompt"
    ):
        reader("unpaired_preference")({"system": "s", "other": "q", "completion": "a", "label": 1})
    with pytest.raises(
        BadRow, match=r"prompt is missing.*also has other: is it there\? convert.fields: {prompt: NAME}"
    ):
        reader("preference")({"other": "q", "chosen": "a", "rejected": "b"})


@pytest.mark.parametrize("name", ["unpaired_preference", "prompt_completion"])
def test_a_completion_that_repeats_its_prompt_asks_once(name: str) -> None:
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    for completion in ([said], [asked, said], [{"role": "system", "content": "s"}, asked, said]):
        made = reader(name)({"prompt": "q", "completion": completion, "label": True})
        found = made.parts[0] if isinstance(made, Example) else made
        wanted = [(turn["role"], turn["content"]) for turn in completion]
        assert [(turn.role, turn.content) for turn in found.turns][-len(wanted) :] == wanted
        assert [turn.role for turn in found.turns].count("user") == 1
    for completion, says in (([asked], "says nothing after the prompt"), ([{**asked, "content": "p"}, said], "begins")):
        with pytest.raises(BadRow, match=says):
            reader(name)({"prompt": "q", "completion": completion, "label": True})


@pytest.mark.parametrize(
    ("label", "good"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        (1.0, True),
        (0.0, False),
        ("1.0", True),
        ("0.0", False),
        ("True", True),
        ("false", False),
        ("0", False),
    ],
)
def test_a_label_is_one_however_it_is_written(label: Any, good: bool) -> None:
    row = {"prompt": "q", "completion": "a", "label": label}
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "kto_tag": label}
    made = reader("unpaired_preference")(row)
    assert isinstance(made, Example) and made.extra == {"label": good}
    for each in (row, chat):
        read = [
            name for name in ("unpaired_preference", "prompt_completion", "messages") if find(name).recognises(each)
        ]
        assert find("unpaired_preference").recognises(each) is not None
        assert not read or read == ["unpaired_preference"]


def test_a_label_that_is_none_is_shown() -> None:
    read = reader("llamafactory", {"columns": {"kto_tag": "good"}})
    with pytest.raises(BadRow, match=r"^good is 'perhaps': expected true or false"):
        read({"instruction": "q", "output": "a", "good": "perhaps"})


CALLED: dict[str, Any] = {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "42"}]}
SPOKEN: dict[str, Any] = {"conversations": [{"from": "human", "value": "q"}]}


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"system": "s", "input": "q", "chosen": "a", "rejected": "b"}, {"prompt": "input"}),
        ({"messages": "q", "chosen": "a", "rejected": "b"}, {"prompt": "messages"}),
        ({**CALLED, "chosen": "a", "rejected": "b"}, {"prompt": "messages"}),
        ({**SPOKEN, "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"}, {"prompt": "conversations"}),
        (
            {"prompt": "q", "chosen_response": "a", "rejected_response": "b"},
            {"chosen": "chosen_response", "rejected": "rejected_response"},
        ),
    ],
)
def test_preferences_are_known_by_the_names_that_public_data_has(row: dict[str, Any], fields: dict[str, str]) -> None:
    assert auto.recognise([row]) == ("preference", fields)
    made = reader("preference", fields=fields)(row)
    assert [part.turns[-1].content for part in made.parts] == ["a", "b"]


@pytest.mark.parametrize("more", [{"instruction": "i"}, {"prompt": "p"}, {"question": "p"}])
def test_two_columns_that_may_both_be_the_prompt_are_not_guessed_between(more: dict[str, str]) -> None:
    with pytest.raises(UserError, match="no format knows these rows"):
        auto.recognise([{"input": "q", **more, "chosen": "a", "rejected": "b"}])


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("preference", {"chosen": "a", "rejected": "b"}),
        ("unpaired_preference", {"completion": "a", "label": True}),
        ("prompt_completion", {"completion": "a"}),
    ],
)
@pytest.mark.parametrize(("half", "other"), [("instruction", "input"), ("input", "instruction")])
def test_half_of_a_question_is_no_prompt(name: str, answers: dict[str, Any], half: str, other: str) -> None:
    read = reader(name, fields={"prompt": half})
    with pytest.raises(BadRow, match=f"^{other} says something besides {half}.*llamafactory"):
        read({half: "Translate.", other: "oak tree", **answers})
    for nothing in ("", " ", None):
        read({half: "Translate.", other: nothing, **answers})
    reader(name)({"prompt": "Translate.", "input": "oak tree", **answers})  # a column that is not read
    meant = reader(name, fields={"prompt": half, "system": other})
    meant({half: "Translate.", other: "You are a botanist.", **answers})


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        ("unpaired_preference", {"prompt": "q", "completion": "a", "label": True}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
    ],
)
def test_turns_before_the_prompt_are_not_left_out(name: str, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"look like {name}, but history holds earlier questions.*llamafactory"):
        auto.recognise([{**row, "history": []}, {**row, "history": [["p", "x"]]}])
    assert auto.recognise([{**row, "history": []}, {**row, "history": None}, {**row, "history": ""}]) == (name, {})


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        ("unpaired_preference", {"prompt": "q", "completion": "a", "label": True}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
    ],
)
def test_a_system_prompt_is_found_under_its_long_name(name: str, row: dict[str, Any]) -> None:
    rows = [{**row, "system_prompt": "Be kind."}, {**row, "system_prompt": None}]
    found, fields = auto.recognise(rows)
    assert (found, fields) == (name, {"system": "system_prompt"})
    for one, roles in zip(rows, (["system", "user"], ["user", "assistant"]), strict=True):
        made = reader(name, fields=dict(fields))(one)
        part = made.parts[0] if isinstance(made, Example) else made
        assert [turn.role for turn in part.turns[:2]] == roles
    assert auto.recognise([{**row, "system": "Be kind.", "system_prompt": "kind"}]) == (name, {})
    assert auto.recognise([row, rows[0]]) == (found, fields)  # JSON Lines need not have a key in every row
    assert auto.recognise(rows, raw=True) == (name, {})
    assert auto.recognise([{**row, "system_prompt": {"id": 3}}]) == (name, {})


def test_a_prompt_for_reinforcement_learning_keeps_its_columns() -> None:
    assert auto.recognise([{"prompt": "q", "system_prompt": "s", "history": [["a", "b"]]}]) == ("prompt_only", {})
