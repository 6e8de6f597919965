"""convert on rows that are not what they should be: each is told with its place, or dropped and counted."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import convert, rows
from stages.errors import UserError
from stages.formats import BadRow, own
from stages.marks import ORIGIN_CONTENT, TRAIN_NO, TRAIN_YES
from stages.rows import read_rows
from stages.runtime import Runtime
from stages.stage import Work
from stages.tokenized import find_shards
from tests.stages.chats import rows_of, run_convert, run_tokenize, smollm2, source

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def counts_of(output: Path) -> Any:
    return json.loads((output / "counts.json").read_text())


def test_every_sort_of_bad_line_is_counted_under_its_reason_with_its_place(tmp_path: Path) -> None:
    bad = {
        "not JSON": b'{"messages": [\n',
        "not UTF-8": b'{"messages": "\xff"}\n',
        "not an object": b"[1, 2]\n",
        "wrong type": line({"messages": "a text"}),
        "missing field": line({"message": []}),
        "not Unicode": line({"messages": [{"role": "user", "content": "\ud83d"}, *GOOD["messages"]]}),
        "unknown role": line({"messages": [{"role": "narrator", "content": "x"}]}),
        "content that is not text": line({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    }
    data = line(GOOD) + b"".join(bad.values()) + b"\x00\n" + line(GOOD)
    output, facts = run_convert(tmp_path, source(tmp_path / "rows", data), smollm2(), {"bad_rows": "drop"})
    counts = counts_of(output)
    assert counts["dropped"] == facts["dropped"] == {**dict.fromkeys(bad, 1), "not JSON": 2}
    assert counts["places"] == {
        **{reason: [f"line {2 + number}"] for number, reason in enumerate(bad)},
        "not JSON": ["line 2", "line 10"],
    }
    assert [row["row"] for row in rows_of(output)] == [0, 10] and counts["rows"] == 11


def test_a_nul_is_a_character_like_others(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a\0b"}, {"role": "assistant", "content": "\0"}]}
    call = {"function": {"name": "f", "arguments": {"x\0": "\0"}}}
    calling = {"messages": [GOOD["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    output, _ = run_convert(tmp_path, source(tmp_path / "rows", [chat, calling]), smollm2(), {"template": "qwen"})
    texts = [row["text"] for row in rows_of(output)]
    assert "a\0b<" in texts[0] and '{"x\\u0000": "\\u0000"}' in texts[1]
    tokens, facts = run_tokenize(tmp_path / "t", output, smollm2())
    assert facts["rows"] == 2 and rows_of(tokens)[0]["ids"]


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_gigantic_row_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: bytes
) -> None:
    monkeypatch.setattr(rows, "LONGEST", 1000)
    path = tmp_path / "rows.jsonl"
    long = [b'{"a": "' + b"x" * size + b'"}\n' for size in (900, 990, 991, 1900, 3000)]
    path.write_bytes(line({"a": 1}) + b"".join(long) + line({"a": 2}).rstrip() + ending)
    found = list(read_rows(path, "f"))
    assert [place for place, _ in found] == [f"line {n}" for n in range(1, 8)]
    assert [isinstance(row, BadRow) for _, row in found] == [False, False, False, True, True, True, False]
    assert found[-1][1] == {"a": 2}


def test_a_column_that_changes_its_type_half_way(tmp_path: Path) -> None:
    table = [{"instruction": "Add.", "output": "3"}] * 3 + [{"instruction": "Add.", "output": 3}]
    with pytest.raises(UserError, match=r"mine.jsonl, line 4: output is a number: expected text"):
        run_convert(tmp_path / "a", source(tmp_path / "a" / "rows", table), smollm2())
    mixed = [{"messages": GOOD["messages"]}] * 2 + [{"messages": "gone"}]
    with pytest.raises(UserError, match=r"mine.jsonl, line 3: messages is text: expected a list"):
        run_convert(tmp_path / "b", source(tmp_path / "b" / "rows", mixed), smollm2())


def test_rows_of_two_formats_in_one_shard_are_told(tmp_path: Path) -> None:
    both = [GOOD, {"instruction": "Add.", "output": "3"}]
    with pytest.raises(UserError, match=r"some rows look like messages, others like alpaca. Say which with convert.f"):
        run_convert(tmp_path, source(tmp_path / "rows", both), smollm2())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"instruction": "1 + 1", "input": "", "output": 2},
            "they have instruction, input, output. As alpaca: output is a number: expected text",
        ),
        ({"a": 1}, r"mine.jsonl: no format knows these rows: they have a\. Say which"),
        ({"messages": [{"role": "user"}]}, r"they have messages\. As messages: messages\[0\].content is missing"),
        ({**GOOD, "instruction": "x", "output": "y"}, r"these rows could be alpaca or messages"),
        ({**GOOD, "chosen": "x", "rejected": "y", "prompt": "p"}, r"could be messages or preference"),
        ({"instruction": "x", "output": "y", "response": "z"}, "no format knows these rows"),
    ],
)
def test_what_auto_does_not_know_for_sure_it_does_not_guess(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run_convert(tmp_path, source(tmp_path / "rows", [row]), smollm2())


def test_auto_says_what_it_chose(tmp_path: Path) -> None:
    dolly = {"instruction": "Add.", "context": "1 2", "response": "3", "category": "closed_qa"}
    output, facts = run_convert(tmp_path, source(tmp_path / "rows", [dolly] * 3), smollm2())
    assert facts["formats"] == {"alpaca": 1}
    counts = counts_of(output)
    assert (counts["format"], counts["fields"]) == ("alpaca", {"output": "response", "input": "context"})


def test_nulls_that_columns_put_into_objects_are_not_data(tmp_path: Path) -> None:
    """Parquet gives each object the keys of all others; a tool would be offered with parameters that it has not."""
    tools = [
        {"type": "function", "function": {"name": "a", "parameters": {"city": {"type": "string"}}}},
        {"type": "function", "function": {"name": "b", "parameters": {"days": {"type": "integer"}}}},
    ]
    chats = [{**GOOD, "tools": [tool]} for tool in tools]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(chats), path)
    assert [row for _, row in read_rows(path, "f")] == chats


def test_special_tokens_in_the_data_are_text_unless_they_are_trusted(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}]}
    found = {}
    for trusted in (False, True):
        folder = tmp_path / str(trusted)
        config = {"trust_special_tokens": trusted}
        shard, _ = run_convert(folder, source(folder / "rows", [chat]), smollm2(), config)
        output, _ = run_tokenize(folder, shard, smollm2())
        [row] = rows_of(output)
        found[trusted] = row["ids"].count(2), counts_of(output)["control_as_text"]
    ends = "the system's, the user's and the assistant's end; and the one in the data"
    assert found == {False: (3, 1), True: (4, 0)}, ends


class TestOwnFormat:
    CODE = """from stages.formats import *; from stages.marks import *
def convert(row, options):
    return MADE
FORMAT = Format(convert, MORE)
"""

    def part(self, folder: Path, made: str, more: str = "") -> convert.ConvertPart:
        path = folder / "mine.py"
        path.write_text(self.CODE.replace("MADE", made).replace(", MORE", more))
        return convert.ConvertPart.model_validate({"format": str(path)})

    def run(self, folder: Path, made: str, *, allow: bool = True, more: str = "") -> list[dict[str, Any]]:
        config = self.part(folder, made, more)
        inputs = {"rows": source(folder / "rows", [{"q": "Who?"}]), "tokenizer": smollm2()}
        (folder / "out").mkdir()
        convert.run(config, inputs, folder / "out", Work(folder / "work", Runtime(allow_code=allow)))
        return rows_of(folder / "out")

    def test_it_runs_only_when_that_is_allowed(self, tmp_path: Path) -> None:
        (tmp_path / "no").mkdir()
        with pytest.raises(UserError, match="--allow-code"):
            self.run(tmp_path / "no", 'Conversation([Turn("user", row["q"])])', allow=False)
        [row] = self.run(tmp_path, 'Conversation([Turn("user", row["q"]), Turn("assistant", "Me.")])')
        assert "Who?<|im_end|>" in row["text"]

    def test_its_text_is_the_key_and_its_path_is_not(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        a, b = (self.part(tmp_path / name, "None") for name in ("a", "b"))
        assert a == b and a.format == "own" and "def convert" in a.code and str(tmp_path) not in a.model_dump_json()

    @pytest.mark.parametrize(
        ("made", "says"),
        [
            ("row['x']", r"line 1: your format fails on it: KeyError: 'x' \(line 3\)"),
            ("None", "your format gives None: expected a Conversation"),
            ("Conversation([Turn('user', '\\ud800')])", "half a surrogate pair"),
            ("Example([Conversation([Turn('user', 'q')])], {'x': {1, 2}})", "what JSON cannot say"),
            ("Conversation([])", "your format gives a conversation without turns"),
            ("Conversation([Turn('human', 'q')])", "turn 0's role is 'human': expected system, user, assistant"),
            ("Conversation([Turn('user', 'q'), Turn('assistant', 5)])", "turn 1's content is a number: expected text"),
            (
                "Example([Conversation([Turn('user', 'q')])] * 2)",
                "is 2 conversations: expected 1 of a row of kind conv",
            ),
            ("exit(3)", "your format fails on it: SystemExit: 3"),
            ("Conversation([{'role': 'user', 'content': 'q'}])", "turn 0 is {'role'.*expected a Turn"),
            ("Conversation(Turn('user', 'q'))", "turns that are a Turn: expected a list"),
            ("Example(Conversation([Turn('user', 'q')]))", "an Example of Conversation.*expected a list"),
            ("Example(['q'])", "an Example of 'q': expected a Conversation"),
            ("Conversation([Turn('user', 'q', train=7)])", "turn 0's train is 7: expected True, False"),
            ("Conversation([Turn('user', 'q', reasoning=5)])", "turn 0's reasoning is a number: expected text"),
            ("Conversation([Turn('user', 'q', name=5)])", "turn 0's name is a number: expected text"),
            ("Conversation([Turn('assistant', None, tool_calls='f')])", "tool_calls is text: expected a list of tool"),
            ("Conversation([Turn('assistant', None, tool_calls=[{}])])", r"tool_calls\[0\].name is missing"),
            ("Conversation([Turn('user', 'q')], tools={'f': 1})", "tools that are an object: expected a list"),
            ("Conversation([Turn('user', 'abc', runs=[(2, 1)])])", r"runs are \[\(2, 1\)\]: .* the last one 3"),
            ("Conversation([Turn('user', 'abc', runs=[(9, 1)])])", "the last one 3"),
            ("Conversation([Turn('user', 'abc', runs=[(3, 1), (2, 1), (3, 2)])])", "the ends ascending"),
            ("Conversation([Turn('user', 'abc', runs=[3])])", r"expected \(end, train\) pairs"),
            ("Conversation([Turn('user', 'abc', runs=[(3, 'yes')])])", "runs have a flag that is 'yes'"),
            ("Conversation([Turn('text', '')], ids=[1])", "ids: expected none without `Format.*ids=True"),
        ],
    )
    def test_what_it_does_wrong_is_told_with_row_and_line(self, tmp_path: Path, made: str, says: str) -> None:
        with pytest.raises(UserError, match=says):
            self.run(tmp_path, made)

    @pytest.mark.parametrize(
        ("given", "trained"), [("True", True), ("False", False), ("TRAIN_YES", True), ("TRAIN_NO", False)]
    )
    def test_true_trains_and_false_does_not(self, tmp_path: Path, given: str, trained: bool) -> None:
        turns = (f"Turn('assistant', 'yes', train={given})", f"Turn('assistant', 'yes', runs=[(3, {given})])")
        for number, turn in enumerate(turns):
            folder = tmp_path / str(number)
            folder.mkdir()
            [row] = self.run(folder, f"Conversation([Turn('user', 'q'), {turn}])")
            said = [span for span in row["spans"] if span["role"] == "assistant" and span["origin"] == ORIGIN_CONTENT]
            assert {span["train"] for span in said} == {TRAIN_YES if trained else TRAIN_NO}

    @pytest.mark.parametrize(
        ("made", "says"),
        [
            ("Conversation([Turn('text', '')], ids=[1, 2])", "expected one of role text with runs"),
            ("Conversation([Turn('text', '', runs=[(2, 2)])])", "ids that are None: expected a list of whole"),
            ("Conversation([Turn('text', '', runs=[(3, 2)])], ids=[1, 2])", "the last one 2"),
            ("Conversation([Turn('text', '', runs=[(2, 2)])], ids=[1, -2])", "ids that are .*expected a list of whole"),
        ],
    )
    def test_ids_and_what_trains_of_them_fit(self, tmp_path: Path, made: str, says: str) -> None:
        with pytest.raises(UserError, match=says):
            self.run(tmp_path, made, more=", ids=True, templated=False")

    @pytest.mark.parametrize(
        ("code", "says"),
        [
            ("import sys\nsys.exit(3)", r"fails when it is loaded: SystemExit: 3 \(line 2\)"),
            ("def convert(:", r"fails when it is loaded: SyntaxError.*\(line 1\)"),
            ("x = 1", "has no FORMAT"),
            ("\n1 / 0", r"ZeroDivisionError: division by zero \(line 2\)"),
        ],
    )
    def test_a_file_that_is_no_format(self, code: str, says: str) -> None:
        with pytest.raises(UserError, match=says):
            own.load(code)


def test_shards_of_one_source_in_two_formats_are_told_before_they_are_packed(tmp_path: Path) -> None:
    for name, row in (("a", GOOD), ("b", {"instruction": "Add.", "output": "3"})):
        shard, _ = run_convert(tmp_path / name, source(tmp_path / name / "rows", [row]), smollm2())
        run_tokenize(tmp_path / "all" / name, shard, smollm2())
    says = r"a/tokens was read as messages, b/tokens as alpaca: set convert.sources.mine.format"
    with pytest.raises(UserError, match=says):
        find_shards(tmp_path / "all")
