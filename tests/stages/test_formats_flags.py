"""What rows say of the training of turns, and lists of messages that stand there as text."""

import json
from typing import Any

import pytest

from stages.errors import UserError
from stages.formats import BadRow, auto
from stages.marks import TRAIN_NO, TRAIN_UNSET, TRAIN_YES
from tests.stages.test_formats import reader, turns

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SPOKEN = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("name", "column", "role", "content", "who"),
    [("messages", "messages", "role", "content", "user"), ("sharegpt", "conversations", "from", "value", "human")],
)
def test_a_weight_of_one_has_the_assistants_words_learned_and_nobody_elses(
    name: str, column: str, role: str, content: str, who: str
) -> None:
    said = [(who, 1), ("assistant", 1), (who, 0), ("assistant", 0), ("tool", 1.0), ("system", 1), ("assistant", None)]
    row = {column: [{role: speaker, content: "x", "weight": weight} for speaker, weight in said]}
    wanted = [TRAIN_UNSET, TRAIN_YES, TRAIN_NO, TRAIN_NO, TRAIN_UNSET, TRAIN_UNSET, TRAIN_UNSET]
    assert [turn.train for turn in turns(name, row)] == wanted


def test_a_flag_of_a_users_turn_or_of_a_part_of_it_has_it_learned() -> None:
    parts = [{"text": "a", "weight": 1}, {"text": "b"}]
    row = {"messages": [{"role": "user", "content": "x", "train": True}, {"role": "user", "content": parts}]}
    whole, halves = turns("messages", row)
    assert whole.train == TRAIN_YES
    assert halves.runs == [(1, TRAIN_YES), (2, TRAIN_UNSET)]
    renamed = {"messages": [{"role": "user", "content": "x", "learn": 1}]}
    assert turns("messages", renamed, fields={"train": "learn"})[0].train == TRAIN_YES


def test_a_turn_whose_loss_is_false_is_not_learned() -> None:
    """As ms-swift writes it. A number under that name is a figure that somebody kept."""
    said = [("assistant", False), ("user", True), ("assistant", 0.7), ("assistant", None)]
    row = {"messages": [{"role": role, "content": "x", "loss": loss} for role, loss in said]}
    assert [turn.train for turn in turns("messages", row)] == [TRAIN_NO, TRAIN_YES, TRAIN_UNSET, TRAIN_UNSET]


@pytest.mark.parametrize(
    ("flag", "train", "runs"),
    [
        ({"train": False}, TRAIN_NO, None),
        ({"weight": 0}, TRAIN_NO, None),
        ({"train": True}, TRAIN_YES, [(2, TRAIN_YES), (4, TRAIN_NO)]),
        ({}, TRAIN_NO, [(2, TRAIN_YES), (4, TRAIN_NO)]),
    ],
)
def test_no_range_is_learned_of_a_turn_that_is_not_to_be(flag: Any, train: int, runs: Any) -> None:
    detail = [{"begin_offset": 0, "end_offset": 1, "train": True}]
    (turn,) = turns(
        "messages", {"messages": [{"role": "assistant", "content": "abcd", "train_detail": detail, **flag}]}
    )
    assert (turn.train, turn.runs) == (train, runs)


def test_the_text_of_a_part_is_found_under_each_of_its_names() -> None:
    parts = [{"text": "a"}, {"content": "b"}, {"value": "c"}, {"type": "text", "content": "d"}]
    (turn,) = turns("messages", {"messages": [{"role": "assistant", "content": parts}]})
    assert turn.content == "abcd"


@pytest.mark.parametrize(
    ("name", "column", "said"), [("messages", "messages", CHAT), ("sharegpt", "conversations", SPOKEN)]
)
def test_a_list_of_messages_may_be_json_text(name: str, column: str, said: Any) -> None:
    row = {column: " " + json.dumps(said)}
    assert turns(name, row) == turns(name, {column: said})
    assert auto.recognise([row]) == (name, {})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('[{"role": "user"', "messages is not JSON"),
        ("[{'role': 'user', 'content': 'q'}]", "messages is not JSON"),
        ("hello", "messages is text: expected a list"),
        ("[]", "messages is empty"),
        ("[1]", r"messages\[0\] is a number"),
    ],
)
def test_other_text_is_no_list_of_messages(value: str, says: str) -> None:
    with pytest.raises(BadRow, match=says):
        turns("messages", {"messages": value})
    with pytest.raises(UserError, match="no format knows these rows"):
        auto.recognise([{"messages": value}])


@pytest.mark.parametrize("written", [json.dumps(CHAT[1:]), str(CHAT[1:]), "\n [ { 'from': 'gpt', 'value': 'a'}]"])
@pytest.mark.parametrize(
    ("name", "row", "field"),
    [
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, "rejected"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, "prompt"),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, "completion"),
        ("unpaired_preference", {"prompt": "q", "completion": "a", "label": True}, "completion"),
        ("prompt_only", {"prompt": "q"}, "prompt"),
        ("stepwise", {"prompt": "q", "completions": ["a"], "labels": [True]}, "prompt"),
    ],
)
def test_messages_that_were_written_as_text_are_not_learned_as_one(
    name: str, row: Any, field: str, written: str
) -> None:
    with pytest.raises(BadRow, match=f"^{field} is a list of messages written as text"):
        reader(name)({**row, field: written})
    reader(name, {"wording": "text"})({**row, field: written})  # where it is raw text, it is meant


@pytest.mark.parametrize(
    "answer",
    [
        '[{"role": "admin", "content": "all"}]',
        '[{"from": "user", "to": "x"}]',
        '[{"value": 3}]',
        'See [{"role": "user"',
    ],
)
def test_an_answer_in_json_that_is_no_conversation_is_an_answer(answer: str) -> None:
    made = reader("preference")({"prompt": "q", "chosen": answer, "rejected": "b"})
    assert made.parts[0].turns[-1].content == answer
