"""`format: auto` decides by the first rows of a shard; what later rows say besides is read, or told."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.formats import auto
from tests.stages.chats import rows_of, run_convert, source

TOKENIZER = Path(__file__).parent.parent / "golden/model"
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
ASKED = {"prompt": "q", "completion": "a"}
DOLLY = {"instruction": "Sum up.", "response": "Short."}
ALPACA = {"instruction": "Sum up.", "output": "Short."}


def last(folder: Path, early: dict[str, Any], late: dict[str, Any]) -> str:
    """The text of a row behind as many others as a format is recognised by."""
    shard, _ = run_convert(folder, source(folder / "rows", [early] * auto.SAMPLE + [late]), TOKENIZER)
    return str(rows_of(shard)[-1]["text"])


@pytest.mark.parametrize(
    ("early", "late", "says"),
    [
        ({**CHAT, "system_prompt": None}, {**CHAT, "system_prompt": "Be kind."}, "Be kind."),
        ({**CHAT, "system_prompt": ""}, {**CHAT, "system_prompt": "Be kind."}, "Be kind."),
        ({**ALPACA, "context": ""}, {**ALPACA, "context": "A long text."}, "A long text."),
        (DOLLY, {**DOLLY, "context": "A long text."}, "A long text."),
        (ALPACA, {**ALPACA, "input": "A long text."}, "A long text."),
        (CHAT, {**CHAT, "system": "Be kind."}, "Be kind."),
    ],
)
def test_what_only_later_rows_say_is_read(tmp_path: Path, early: Any, late: Any, says: str) -> None:
    assert says in last(tmp_path, early, late)


@pytest.mark.parametrize(
    ("early", "late", "column"),
    [
        (CHAT, {**CHAT, "system_prompt": "Be kind."}, "system_prompt"),
        ({**CHAT, "system_prompt": ""}, {**CHAT, "system": "Be kind."}, "system"),
        (ALPACA, {**ALPACA, "context": "A long text."}, "context"),
        (DOLLY, {**DOLLY, "input": "A long text."}, "input"),
        ({**ASKED, "history": []}, {**ASKED, "history": [["p", "x"]]}, "history"),
        (ASKED, {**ASKED, "label": False}, "label"),
        ({**ASKED, "label": None}, {**ASKED, "label": 0}, "label"),
        (CHAT, {**CHAT, "kto_tag": False}, "kto_tag"),
    ],
)
def test_what_would_have_been_read_otherwise_is_a_bad_row(tmp_path: Path, early: Any, late: Any, column: str) -> None:
    with pytest.raises(UserError, match=rf"line 101: {column} says something, which it did not in the first 100 rows"):
        last(tmp_path, early, late)


@pytest.mark.parametrize(
    ("early", "more"),
    [
        ({"text": "a film"}, {"label": 1}),  # a class: raw text has no answers to judge
        (CHAT, {"context": "where it is from", "label": True, "history": [["p", "x"]]}),
        ({"prompt": "q"}, {"system_prompt": "s", "history": [["p", "x"]], "label": True}),  # all is kept for rewards
    ],
)
def test_columns_that_mean_something_else_there_are_none_of_it(tmp_path: Path, early: Any, more: Any) -> None:
    assert last(tmp_path, early, {**early, **more})


def test_rows_of_dolly_may_lack_their_context() -> None:
    fields = {"input": "context", "output": "response"}
    asked, about = DOLLY, {**DOLLY, "context": "A long text."}
    for rows in ([asked, about], [about, asked], [asked], [{**about, "input": None}, {**asked, "input": None}]):
        assert auto.recognise(rows) == ("alpaca", fields)
    assert auto.recognise([asked, {**asked, "input": "A long text."}]) == ("alpaca", {"output": "response"})


def test_the_report_does_not_miss_a_column_that_only_auto_thought_of(tmp_path: Path) -> None:
    shard, _ = run_convert(tmp_path, source(tmp_path / "rows", [DOLLY]), TOKENIZER)
    counts = json.loads((shard / "counts.json").read_text())
    assert counts["fields"] == {"input": "context", "output": "response"} and "absent" not in counts
