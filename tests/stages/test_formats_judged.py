"""Formats of judged answers, and of answers to a prompt: it is asked once, two answers part, a label is a label."""

import math
from typing import Any, ClassVar

import pytest

from stages.formats import BadRow, Example, find
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
            ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}, "wrong type", "margin is text"),
            ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.inf}, "wrong type", "margin is inf"),
            ({"prompt": "p", "chosen": [*ASKED, SAID], "rejected": "b"}, "two prompts", "chosen begins with a turn of"),
            ({"prompt": "q", "chosen": [*ASKED, SAID], "rejected": [*MORE, SAID]}, "two prompts", "do not begin alike"),
            ({"chosen": [*ASKED, SAID], "rejected": [*OTHER, SAID]}, "two prompts", "chosen goes on with a turn of us"),
        ],
    )
    def test_a_bad_row_is_told(self, row: Any, reason: str, says: str) -> None:
        with pytest.raises(BadRow, match=says) as error:
            reader("preference")(row)
        assert error.value.reason == reason


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
    [(True, True), (False, False), (1, True), (0, False), ("True", True), ("false", False), ("0", False)],
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
