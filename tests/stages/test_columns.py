"""Columns of which a format reads nothing are counted, whatever the format; nothing that it reads is."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from stages import formats
from stages.columns import Columns
from stages.data_page import html
from stages.data_report import markdown
from tests.stages.packed import Packed, row, shard

TURNS = [{"role": "user", "text": "{q}"}, {"role": "assistant", "text": "{a}"}]
SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def unread(name: str, rows: list[dict[str, Any]], **options: Any) -> dict[str, int]:
    reader = formats.reader(name, options.pop("fields", {}), {}, options)
    return seen(reader.convert, rows, reader.named)


def seen(
    convert: Callable[[dict[str, Any]], Any], rows: list[dict[str, Any]], named: Collection[str] = ()
) -> dict[str, int]:
    columns = Columns(named)
    for one in rows:
        convert(watched := columns.watched(one))
        columns.saw(watched)
    return columns.unread


@pytest.mark.parametrize(
    ("name", "row", "options"),
    [
        ("messages", {"messages": SAID, "tools": None, "system": "s"}, {}),
        ("alpaca", {"instruction": "i", "input": "x", "output": "o"}, {}),
        ("alpaca", {"instruction": "i", "context": "x", "output": "o"}, {"fields": {"input": "context"}}),
        ("prompt_completion", {"prompt": "p", "completion": "c"}, {}),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.5}, {}),
        ("unpaired_preference", {"prompt": "p", "completion": "a", "label": True}, {}),
        ("completion", {"text": "t"}, {}),
        ("input_output", {"segments": [{"text": "t", "label": True}]}, {}),
        ("pretokenized", {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1]}, {}),
        (
            "fields",
            {"q": "q", "a": "a"},
            {"turns": [{"role": "user", "text": "{q}"}, {"role": "assistant", "text": "{a}"}]},
        ),
        ("llamafactory", {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]]}, {}),
    ],
)
def test_what_a_format_reads_is_read_and_the_rest_is_counted(
    name: str, row: dict[str, Any], options: dict[str, Any]
) -> None:
    assert unread(name, [row] * 3, **options) == {}
    more = [{**row, "id": number, "note": "n" if number else None} for number in range(9)]
    assert unread(name, more, **options) == {"id": 9, "note": 8}


def test_all_of_a_prompt_is_kept_for_rewards() -> None:
    assert unread("prompt_only", [{"prompt": "p", "answer": "a", "level": 1}]) == {}


def test_a_column_that_later_rows_have_in_anothers_place_is_told() -> None:
    early = [{"instruction": "i", "input": "x", "output": "o"}] * 300
    late = [{"instruction": "i", "context": "x", "output": "o"}] * 20
    assert unread("alpaca", early + late) == {"context": 20}


def test_what_is_read_in_some_rows_only_is_read() -> None:
    """Not every row asks for every column: the first without an `input` says nothing of those with one."""
    turns = [{"role": "user", "text": ["{a}", "{b}"]}, {"role": "assistant", "text": "{c}"}]
    rows = [{"a": "x", "b": "y", "c": "z"}, {"a": None, "b": "y", "c": "z"}]
    assert unread("fields", rows, turns=turns) == {}


def test_a_column_that_only_some_rows_ask_for_is_read() -> None:
    rows = [{"q": "" if number == 2 else "q", "b": "b"} for number in range(20)]
    assert seen(lambda row: row["q"] or row["b"], rows) == {}


def test_a_format_may_remember_rows_and_take_values_out_of_them() -> None:
    """Each row is converted once."""
    before: set[str] = set()

    def convert(row: dict[str, Any]) -> None:
        said = row.pop("q")
        assert said not in before
        before.add(said)

    assert seen(convert, [{"q": str(number), "a": "x"} for number in range(20)]) == {"a": 20}


def test_what_says_nothing_does_not_count() -> None:
    assert seen(lambda row: None, [{"a": "", "b": [], "c": {}, "d": None, "e": 0, "f": False}]) == {"e": 1, "f": 1}


def test_rows_whose_every_key_is_another_one_take_no_memory() -> None:
    assert len(seen(lambda row: row["a"], [{"a": 1, f"k{number}": 1} for number in range(5000)])) <= 100


def test_copying_a_row_reads_it() -> None:
    assert seen(lambda row: {**row}, [{"a": 1, "b": 2}]) == {}


def test_the_report_says_what_was_not_read(tmp_path: Path) -> None:
    asked = row(("user", 3), ("assistant", 4))
    shard(tmp_path / "tokens", "chat/00000", [asked], unread={"id": 1})
    shard(tmp_path / "tokens", "chat/00001", [asked, asked], unread={"id": 2, "<context>": 1})
    shard(tmp_path / "tokens", "other/00000", [asked])
    Packed(tmp_path / "tokens", tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert "not read of chat: id (3), <context> (1)\n" in markdown(report)
    assert "not read of chat: id (3), &lt;context&gt; (1)" in html(report)
    assert "not read of other" not in markdown(report)
