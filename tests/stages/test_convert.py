"""convert: rows in any file and format become the same conversations; bad ones are told, or dropped and counted."""

import csv
import json
import os
import shutil
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from stages import convert, formats
from stages.errors import UserError
from stages.formats import Conversation, Example, Turn
from stages.identity import File, Tree, canonical_json, tree_of
from stages.marks import NO_TURN, TRAIN_NO, TRAIN_UNSET
from stages.sequences import identity
from stages.stage import Work
from stages.tables import CONVERSATIONS, read_table
from stages.tokenized import find_shards
from tests.stages.chats import digest, rows_of, run_convert, run_tokenize, smollm2, source

CHAT = {"messages": [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "Là.", "weight": 0}]}
BAD = {"messages": [{"role": "user"}]}
ALPACA = [{"instruction": "Add.", "input": f"1 {n}", "output": str(n + 1)} for n in range(3)]


def pieces(row: dict[str, Any]) -> list[tuple[str, int, str, int, str]]:
    data = row["text"].encode()
    return [
        ("TCE"[s["origin"]], s["turn"], s["role"], s["train"], data[s["start"] : s["end"]].decode())
        for s in row["spans"]
    ]


def test_a_row_becomes_text_with_spans(tmp_path: Path) -> None:
    output, facts = run_convert(tmp_path, source(tmp_path / "rows", [CHAT]), smollm2())
    [row] = rows_of(output)
    assert row["row"] == 0 and len(row["identity"]) == 16
    assert pieces(row)[1:] == [
        ("C", 0, "user", TRAIN_UNSET, "Où?"),
        ("E", 0, "user", TRAIN_UNSET, "<|im_end|>"),
        ("T", NO_TURN, "", TRAIN_UNSET, "\n<|im_start|>assistant\n"),
        ("C", 1, "assistant", TRAIN_NO, "Là."),
        ("E", 1, "assistant", TRAIN_NO, "<|im_end|>"),
        ("T", NO_TURN, "", TRAIN_UNSET, "\n"),
    ]
    assert read_table(output / "conversations.arrow").schema.equals(CONVERSATIONS)
    assert json.loads((output / "counts.json").read_text()) == {
        "source": "mine",
        "split": "train",
        "kind": "conversation",
        "format": "messages",
        "fields": {},
        "own_ends": False,
        "first": 0,
        "rows": 1,
        "dropped": {},
        "places": {},
        "unwritten": {},
        "turns_without_end": 0,
    }
    assert facts == {"rows": 1, "dropped": {}, "unwritten": {}, "formats": {"messages": 1}}


def written(folder: Path, suffix: str) -> Path:
    """The alpaca rows as a file of one kind."""
    table = pa.Table.from_pylist(ALPACA)
    path = folder / f"rows{suffix}"
    match suffix:
        case ".json":
            path.write_text(json.dumps(ALPACA, indent=1))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ALPACA[0])
                writer.writeheader()
                writer.writerows(ALPACA)
        case ".parquet":
            pq.write_table(table, path, row_group_size=2)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet", ".arrow"])
def test_every_kind_of_file_says_the_same(tmp_path: Path, suffix: str) -> None:
    lines, _ = run_convert(tmp_path / "a", source(tmp_path / "lines", ALPACA), smollm2(), {"format": "alpaca"})
    other = source(tmp_path / "other", written(tmp_path, suffix).read_bytes(), suffix)
    found, _ = run_convert(tmp_path / "b", other, smollm2(), {"format": "alpaca"})
    assert digest(lines) == digest(found)


def test_an_arrow_stream_and_a_json_of_lines_are_read_too(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ALPACA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stream = source(tmp_path / "stream", sink.getvalue().to_pybytes(), ".arrow")
    lines = "".join(json.dumps(row) + "\n" for row in ALPACA).encode()
    as_json = source(tmp_path / "json", b"\xef\xbb\xbf" + lines, ".json")
    found = [
        rows_of(run_convert(p.parent / f"{p.name}-", p, smollm2(), {"format": "alpaca"})[0]) for p in (stream, as_json)
    ]
    assert found[0] == found[1] and len(found[0]) == 3


def test_the_same_conversation_has_the_same_identity_in_every_format(tmp_path: Path) -> None:
    kinds: dict[str, Any] = {
        "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "alpaca": {"instruction": "q", "output": "a"},
        "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "prompt_completion": {"prompt": "q", "completion": "a"},  # whose prompt never trains
    }
    found = [
        rows_of(run_convert(tmp_path / kind, source(tmp_path / kind / "r", [row]), smollm2(), {"format": kind})[0])
        for kind, row in kinds.items()
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][0]["identity"] == found[3][0]["identity"]


def test_identity_is_over_all_that_is_said_and_not_over_what_trains() -> None:
    base = Conversation([Turn("user", "q"), Turn("assistant", "a")])
    others = [
        Conversation([Turn("user", "q"), Turn("assistant", "b")]),
        Conversation([Turn("user", "qa"), Turn("assistant", "")]),
        Conversation([Turn("user", "q"), Turn("user", "a")]),
        Conversation([Turn("user", "q"), Turn("assistant", "a", reasoning="r")]),
        Conversation(base.turns, tools=[{"name": "f"}]),
    ]
    found = {identity(conversation) for conversation in [base, *others]}
    assert len(found) == len(others) + 1
    runs: Any = [(1, TRAIN_NO)]
    for same in (
        Conversation(list(base.turns)),
        Conversation([Turn("user", "q"), Turn("assistant", "a", train=TRAIN_NO)]),
        Conversation([Turn("user", "q"), Turn("assistant", "a", runs=runs)]),
    ):
        assert identity(same) == identity(base)


def test_raw_text_has_one_identity_however_it_is_cut() -> None:
    """A held-out text does not train as a prompt and its answer, or in segments."""
    whole = identity(Conversation([Turn("text", "What is it? A cat.")]))
    cut = [Turn("text", "What is it?", train=TRAIN_NO), Turn("text", " A cat.")]
    assert identity(Conversation(cut)) == whole
    asked = [Turn("user", "q"), Turn("text", "a"), Turn("text", "b")]
    assert identity(Conversation(asked)) == identity(Conversation([*asked[:1], Turn("text", "ab")]))
    assert identity(Conversation(cut, between="\n")) != whole, "what stands between is said, too"
    pairs = [Example([Conversation(said), Conversation(said)]) for said in (cut, [Turn("text", "What is it? A cat.")])]
    assert identity(pairs[0]) == identity(pairs[1])


def test_what_comes_with_a_row_is_in_half_of_its_identity() -> None:
    """The half that does not decide which side it is on."""
    parts = [Conversation([Turn("user", "q"), Turn("assistant", "a")])]
    found = [identity(Example(parts, {"label": label})) for label in (True, False)]
    assert found[0][:8] == found[1][:8] and found[0][8:] != found[1][8:]
    other = identity(Example([Conversation([Turn("user", "q"), Turn("assistant", "b")])], {"label": True}))
    assert other[:8] != found[0][:8] and other[8:] != found[0][8:]


@pytest.mark.parametrize(
    ("data", "suffix", "says"),
    [
        (b'{"messages": []}\n', ".jsonl", "mine.jsonl, line 1: messages is empty"),
        (b"\n\n" + json.dumps(BAD).encode(), ".jsonl", r"mine.jsonl, line 3: messages\[0\].content is missing"),
        (b'{"messages": \n', ".jsonl", "mine.jsonl, line 1: is not JSON"),
        (b"[1]\n", ".jsonl", "mine.jsonl, line 1: is not an object"),
        (b'{"messages": "\xff"}\n', ".jsonl", "mine.jsonl, line 1: is not UTF-8"),
        (json.dumps([CHAT, BAD]).encode(), ".json", r"mine.json, row 2: messages\[0\].content is missing"),
        (b"[1, 2", ".json", "mine.json is not JSON"),
        (b'"x"', ".json", "mine.json holds no list of rows"),
        (b"a,b\n1,2\n1,2,3\n", ".csv", "mine.csv, line 3: has not the 2 columns"),
        (b"a,b\n1,2\n1\n", ".csv", "mine.csv, line 3: has not the 2 columns"),
        (b"not parquet at all", ".parquet", "mine.parquet is not Parquet"),
        (b"not arrow at all", ".arrow", "mine.arrow is not Arrow"),
        (b"\n", ".jsonl", "mine.jsonl: there are no rows in it"),
        (b"[]", ".json", "mine.json: there are no rows in it"),
        (
            json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode(),
            ".jsonl",
            "mine.jsonl, line 1: holds half a surrogate pair",
        ),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path: Path, data: bytes, suffix: str, says: str) -> None:
    format_ = {"format": "alpaca", "fields": {"instruction": "a", "output": "b"}}
    format_ = format_ if suffix == ".csv" else {"format": "messages"}
    with pytest.raises(UserError, match=says):
        run_convert(tmp_path, source(tmp_path / "rows", data, suffix), smollm2(), format_)


def test_a_bad_row_stops_with_the_mend_or_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = source(tmp_path / "rows", [CHAT, *[BAD] * 12, {"messages": [{"role": "x", "content": "y"}]}, CHAT])
    with pytest.raises(UserError, match=r"mine.jsonl, line 2: .*convert.bad_rows: drop"):
        run_convert(tmp_path / "strict", rows, smollm2())
    output, facts = run_convert(tmp_path, rows, smollm2(), {"bad_rows": "drop"})
    assert [row["row"] for row in rows_of(output)] == [0, 14], "rows keep their number in the file"
    counts = json.loads((output / "counts.json").read_text())
    assert counts["rows"] == 15
    assert counts["dropped"] == facts["dropped"] == {"missing field": 12, "unknown role": 1}
    assert counts["places"]["missing field"] == [f"line {n}" for n in range(2, 12)]
    assert counts["places"]["unknown role"] == ["line 14"]


def test_what_a_file_is_called_is_in_messages_alone(tmp_path: Path) -> None:
    """A shard that grows back after a rename has the bytes that it had, so nothing behind it is made anew."""
    rows = source(tmp_path / "rows", [CHAT, BAD])
    made = []
    for number, name in enumerate(["monday.jsonl", os.fsdecode(b"caf\xe9.jsonl")]):
        (output := tmp_path / str(number)).mkdir()
        work = Work(tmp_path / "work", where={"name": name})
        inputs = {"rows": rows, "tokenizer": smollm2()}
        with pytest.raises(UserError, match=f"^{name}, line 2: "):
            convert.run(convert.ConvertPart(), inputs, output, work)
        convert.run(convert.ConvertPart(bad_rows="drop"), inputs, output, work)
        made.append(tree_of(output))
    assert made[0] == made[1]


def test_rows_are_numbered_over_the_pieces_of_a_file(tmp_path: Path) -> None:
    rows = source(tmp_path / "rows", [CHAT])
    about = json.loads((rows / "source.json").read_text())
    (rows / "source.json").write_text(json.dumps({**about, "first": 21, "rows_before": 10}))
    output, _ = run_convert(tmp_path, rows, smollm2())
    (tmp_path / "data").mkdir()
    run_tokenize(tmp_path / "tokenized", output, smollm2())[0].rename(tmp_path / "data" / "mine")
    (shard,) = find_shards(tmp_path / "data")
    assert shard.place(0) == "mine, row 11"


def test_a_row_of_another_format_is_recognized(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: messages is missing.* It looks like alpaca: set convert.format"):
        run_convert(tmp_path, source(tmp_path / "rows", ALPACA), smollm2(), {"format": "messages"})


def test_what_the_template_refuses_names_the_row(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    rows = [CHAT, {"messages": [{"role": "tool", "content": "x"}]}]
    with pytest.raises(UserError, match=r"mine.jsonl, line 2: the chat template refuses it: no tools here"):
        run_convert(tmp_path, source(tmp_path / "rows", rows), smollm2(), {"template": template})


@pytest.mark.parametrize(
    ("reasoning", "kept"),
    [(None, ["one", "two", "three"]), ("keep", ["one", "two", "three"]), ("drop", []), ("last", ["two", "three"])],
)
def test_reasoning_is_kept_dropped_or_kept_after_the_last_question(
    tmp_path: Path, reasoning: str | None, kept: list[str]
) -> None:
    chat = {
        "messages": [
            {"role": "user", "content": "q1"},
            {"role": "assistant", "content": "a1", "reasoning_content": "one"},
            {"role": "user", "content": "q2"},
            {"role": "assistant", "content": "a2", "reasoning_content": "two"},
            {"role": "assistant", "content": "<think>\nthree\n</think>\n\na3"},
        ]
    }
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
        "{{ m.content }}<end>\n{% endfor %}"
    )
    config = {"format": "messages", "template": template, **({"reasoning": reasoning} if reasoning else {})}
    output, _ = run_convert(tmp_path, source(tmp_path / "rows", [chat]), smollm2(), config)
    [row] = rows_of(output)
    assert [word for word in ("one", "two", "three") if word in row["text"]] == kept
    assert all(answer in row["text"] for answer in ("a1", "a2", "a3")) and row["text"].count("<end>") == 5
    said = "".join(
        row["text"].encode()[s["start"] : s["end"]].decode() for s in row["spans"] if s["role"] == "assistant"
    )
    assert [word for word in ("one", "two", "three") if word in said] == kept, "what is kept trains with its turn"


def test_what_is_left_unwritten_and_unended_is_counted(tmp_path: Path) -> None:
    chat = {
        "messages": [*CHAT["messages"], {"role": "assistant", "content": "b", "reasoning_content": "hm"}],
        "tools": [{"name": "f"}],
    }
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    output, facts = run_convert(tmp_path, source(tmp_path / "rows", [chat]), smollm2(), {"template": template})
    assert facts["unwritten"] == {"tools": 1, "reasoning of assistant": 1}
    assert json.loads((output / "counts.json").read_text())["turns_without_end"] == 2


@pytest.mark.parametrize(
    ("config", "absent"),
    [
        ({"format": "alpaca", "fields": {"input": "contxt"}}, ["contxt"]),
        ({"format": "alpaca", "fields": {"input": "context", "system": "late"}}, None),
        ({"format": "llamafactory", "options": {"columns": {"query": "contxt", "system": ""}}}, ["contxt"]),
        (
            {
                "format": "fields",
                "options": {
                    "turns": [
                        {"role": "system", "text": "{late} {systm[x]}", "optional": True},
                        {"role": "user", "text": ["{instruction} {contxt}", "{instruction}"]},
                        {"role": "assistant", "text": "{output}", "reasoning": "{thougts}"},
                    ]
                },
            },
            ["contxt", "systm", "thougts"],
        ),
        ({"format": "messages", "fields": {"weight": "w", "name": "who"}}, ["who"]),
    ],
)
def test_what_a_recipe_names_and_no_row_has_is_counted(tmp_path: Path, config: Any, absent: Any) -> None:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "w": 0}]
    row = {"instruction": "q", "output": "a", "context": None, "messages": said}
    rows = source(tmp_path / "rows", [row, {**row, "late": "s"}])
    output, _ = run_convert(tmp_path, rows, smollm2(), config)
    assert json.loads((output / "counts.json").read_text()).get("absent") == absent


def test_completion_needs_no_template_and_ends_with_the_tokenizers_end(tmp_path: Path) -> None:
    tokenizer = tmp_path / "model"
    tokenizer.mkdir()
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (tokenizer / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "post_processor": processor}))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))
    rows = source(tmp_path / "rows", [{"text": "Où?"}])
    output, _ = run_convert(tmp_path, rows, tokenizer, {"format": "completion"})
    assert pieces(rows_of(output)[0]) == [
        ("T", NO_TURN, "", TRAIN_UNSET, "<s>"),
        ("C", 0, "text", TRAIN_UNSET, "Où?"),
        ("E", 0, "text", TRAIN_UNSET, "</s>"),
    ]
    with pytest.raises(UserError, match="no chat template"):
        run_convert(tmp_path / "chat", source(tmp_path / "chats", [CHAT]), tokenizer)
    raw = {"format": "prompt_completion", "options": {"wording": "text"}}
    plain = source(tmp_path / "raw/rows", [{"prompt": "Où?", "completion": " Là."}])
    output, _ = run_convert(tmp_path / "raw", plain, tokenizer, raw)
    assert [row["text"] for row in rows_of(output)] == ["<s>Où? Là.</s>"]
    assert not (output / "chat_template.jinja").exists()
    asked = [{"prompt": [{"role": "user", "content": "Où?"}], "completion": "Là."}]
    with pytest.raises(UserError, match="line 1: has turns with roles, and prompt_completion uses no chat template"):
        run_convert(tmp_path / "asked", source(tmp_path / "asked/rows", asked), tokenizer, raw)
    texts = ["<s>Où?</s>", "Où?</s>", "<s>Où?", "</s>"]
    for trusted in (True, False):  # once is enough, where the data's own are the same tokens
        folder = tmp_path / str(trusted)
        rows = source(folder / "rows", [{"text": text} for text in texts])
        config = {"format": "completion", "trust_special_tokens": trusted}
        output, _ = run_convert(folder, rows, tokenizer, config)
        expected = ["<s>Où?</s>"] * 3 + ["<s></s>"] if trusted else [f"<s>{text}</s>" for text in texts]
        assert [row["text"] for row in rows_of(output)] == expected
        assert all(pieces(row)[-1] == ("E", 0, "text", TRAIN_UNSET, "</s>") for row in rows_of(output))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizers_file_that_is_cut_short_is_named(tmp_path: Path, name: str) -> None:
    shutil.copytree(smollm2(), tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(b'{"added_tokens": [')
    with pytest.raises(UserError, match=rf"^the model's {name} is not JSON, or cut short: .*save the tokenizer again"):
        run_convert(tmp_path, source(tmp_path / "rows", [CHAT]), tmp_path / "model")


def test_a_column_may_have_a_name_that_utf_8_cannot_say(tmp_path: Path) -> None:
    rows = source(tmp_path / "rows", b'{"text": "a", "\\ud800": "x"}\n{"text": 5}\n')
    shard, _ = run_convert(tmp_path, rows, smollm2(), {"format": "completion", "bad_rows": "drop"})
    counts = json.loads((shard / "counts.json").read_text("utf-8"))
    assert counts["unread"] == {"?": 1} and counts["places"] == {"wrong type": ["line 2"]}


def test_a_prompt_keeps_times_and_decimals_as_text_and_tells_what_has_none(tmp_path: Path) -> None:
    columns = {"prompt": ["q"], "on": [date(2024, 5, 1)], "paid": [Decimal("1.50")], "at": [timedelta(hours=1)]}
    for name, more in (("good", {"level": [float("nan")]}), ("bad", {"scan": [b"x"]})):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({**columns, **more}), tmp_path / f"{name}.parquet")
    data = {name: (tmp_path / f"{name}.parquet").read_bytes() for name in ("good", "bad")}
    shard, _ = run_convert(tmp_path, source(tmp_path / "good/rows", data["good"], ".parquet"), smollm2())
    extra = json.loads(rows_of(shard)[0]["extra"])
    assert extra == {"on": "2024-05-01", "paid": "1.50", "at": "1:00:00", "level": None}
    with pytest.raises(UserError, match=r"row 1: scan holds what JSON cannot say \(a bytes\): leave it out"):
        run_convert(tmp_path / "bad", source(tmp_path / "bad/rows", data["bad"], ".parquet"), smollm2())


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = source(tmp_path / "rows", [CHAT] * 1500)
    once, _ = run_convert(tmp_path / "a", rows, smollm2())
    again, _ = run_convert(tmp_path / "b", rows, smollm2())
    assert digest(once) == digest(again)


class TestConfig:
    def test_a_source_has_its_own_settings_and_nobody_elses(self) -> None:
        config = convert.ConvertConfig.model_validate(
            {
                "format": "messages",
                "fields": {"messages": "chat"},
                "template": "chatml",
                "sources": {"a": {"format": "alpaca"}, "b": {"bad_rows": "drop"}},
            }
        )
        names = [
            "a/00000/rows.jsonl",
            "a/00000/source.json",
            "b/00000/rows.csv",
            "b/00000/source.json",
            "c/00000/rows.csv",
        ]
        rows = Tree(tuple(File(name, 1, "0" * 64) for name in names))
        found = {part.name: part for part in convert.parts(config, {"rows": rows, "tokenizer": Tree(())})}
        assert list(found) == ["a/00000", "b/00000", "c/00000"]
        assert {file.path for file in found["a/00000"].inputs["rows"].files} == {"rows.jsonl", "source.json"}
        a, b, c = (convert.ConvertPart.model_validate(part.config) for part in found.values())
        assert (a.format, a.fields, a.template, a.bad_rows) == ("alpaca", {}, "chatml", "error")
        assert (b.format, b.fields, b.bad_rows) == ("messages", {"messages": "chat"}, "drop")
        assert (c.format, c.fields, c.bad_rows) == ("messages", {"messages": "chat"}, "error")
        for part in found.values():
            canonical_json(dict(part.config))

    def test_plugins_are_those_in_use(self) -> None:
        config = convert.ConvertConfig.model_validate(
            {
                "format": "messages",
                "template": "chatml",
                "sources": {"a": {"format": "alpaca"}, "c": {"format": "auto"}},
            }
        )
        assert set(convert.plugins(config.of("a"))) == {"format:alpaca", "template:chatml"}
        assert set(convert.plugins(config.of("b"))) == {"format:messages", "template:chatml"}
        every = {"template:chatml", *(f"format:{name}" for name in formats.names())}
        assert set(convert.plugins(config)) == set(convert.plugins(config.of("c"))) == every

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"format": "alpacca"}, "Did you mean alpaca"),
            ({"template": "chatlm"}, "Did you mean chatml"),
            ({"sources": {"a": {"format": "x"}}}, "there is no format 'x'"),
            ({"format": "messages", "fields": {"mesages": "x"}}, "Did you mean messages"),
            ({"fields": {"messages": "x"}}, "fields: auto takes none: name the format"),
            ({"format": "messages", "options": {"wording": "chat"}}, "options: messages takes none"),
            ({"format": "alpaca", "options": {"wordin": "chat"}}, "Did you mean wording"),
            ({"format": "alpaca", "options": {"wording": "chart"}}, "options.wording: Input should be 'chat'"),
            ({"format": "nowhere.py"}, "cannot read nowhere.py"),
            ({"format": "own"}, "needs a file"),
            ({"template": "nowhere.jinja"}, "no chat template file nowhere.jinja"),
            ({"sources": {"a": {"format": "alpaca", "fields": {"messages": "x"}}}}, "alpaca has no 'messages'"),
            ({"roles": {"agent": "assistent"}}, "assistant"),
            ({"bad_rows": "skip"}, "drop"),
            ({"formatt": "alpaca"}, "formatt"),
        ],
    )
    def test_what_cannot_be_is_refused_with_the_recipe(self, config: dict[str, Any], says: str) -> None:
        with pytest.raises(ValidationError, match=says):
            convert.ConvertConfig.model_validate(config)

    def test_null_of_a_source_means_what_the_section_says(self) -> None:
        config = convert.ConvertConfig.model_validate({"sources": {"a": {"template": None}}})
        assert config.of("a") == config.of("b") and config.of("a").template == "tokenizer"
