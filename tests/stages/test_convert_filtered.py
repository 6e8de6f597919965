"""What a filter leaves out says nothing of the rows that stay: not of their format either."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages import pack
from stages.convert import STAGE, ConvertPart
from stages.errors import UserError
from stages.formats import auto
from stages.runtime import Runtime
from stages.stage import Work
from stages.tables import read_table
from stages.tokenized import find_shards
from tests.stages.chats import rows_of, run_convert, run_tokenize, source

TOKENIZER = Path(__file__).parent.parent / "golden/model"


def converted(folder: Path, rows: list[dict[str, Any]], **config: Any) -> tuple[dict[str, Any], list[str]]:
    """Facts, and the texts that were written."""
    shard, output = folder / "rows", folder / "output"
    for each in (shard, output):
        each.mkdir(parents=True)
    (shard / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (shard / "source.json").write_text(json.dumps({"source": "mixed", "split": "train", "first": 1}))
    work = Work(folder / "work", Runtime(cache=folder / "cache"))
    facts: Any = STAGE.run(ConvertPart(**config), {"rows": shard, "tokenizer": TOKENIZER}, output, work)
    return facts, read_table(output / "conversations.arrow")["text"].to_pylist()


def test_rows_that_are_left_out_do_not_decide_the_format(tmp_path: Path) -> None:
    """Chats that also carry their text, behind as many pages of plain text as a format is recognised by."""
    pages = [{"kind": "web", "text": f"page {n}", "messages": None} for n in range(auto.SAMPLE)]
    said = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
    chats = [{"kind": "chat", "text": "User: ask Assistant: say", "messages": said}] * 3
    facts, texts = converted(tmp_path, [*pages, *chats], filter='kind == "chat"')
    assert facts["formats"] == {"messages": 1}
    assert facts["rows"] == auto.SAMPLE + 3 and facts["dropped"] == {"filtered": auto.SAMPLE}
    assert len(texts) == 3 and "User:" not in texts[0]


PAIR = {"kind": "pair", "prompt": "q", "chosen": "a", "rejected": "b"}
JUDGED = {"kind": "judged", "prompt": "q", "completion": "a", "label": True}


@pytest.mark.parametrize("gone", [PAIR, {"kind": "odd", "x": 1}, JUDGED])
def test_a_shard_of_which_nothing_stays_is_of_no_kind_and_goes_with_the_others(
    tmp_path: Path, gone: dict[str, Any]
) -> None:
    """Whatever its rows would have been: they come first here, by name."""
    judged = [{**JUDGED, "kind": "kept", "prompt": f"{n}?", "label": n % 2 == 0} for n in range(4)]
    for name, rows in (("a", [gone]), ("b", judged)):
        converted(tmp_path / name, rows, filter='kind == "kept"')
        run_tokenize(tmp_path / "all" / name, tmp_path / name / "output", TOKENIZER)
    counts = json.loads((tmp_path / "a/output/counts.json").read_text())
    assert not {"kind", "format"} & counts.keys()
    shards = find_shards(tmp_path / "all")
    assert [shard.kind for shard in shards] == ["unpaired_preference"] * 2
    inputs = {"spans": tmp_path / "all", "tokens": tmp_path / "all", "tokenizer": TOKENIZER}
    (tmp_path / "plan").mkdir()
    config = pack.PackConfig(sequence_length=64, global_batch=2)
    told = pack.run(config, inputs, tmp_path / "plan", Work(tmp_path / "w"))
    assert (told["rows"], told["documents"]) == (5, 4)


def test_a_file_of_bad_lines_alone_is_dropped_and_counted_or_told(tmp_path: Path) -> None:
    for name in ("drop", "stop"):
        (tmp_path / name).mkdir()
    cut = b'{"text": "cut o'
    shard, facts = run_convert(tmp_path / "drop", source(tmp_path / "drop/rows", cut), TOKENIZER, {"bad_rows": "drop"})
    assert facts["dropped"] == {"not JSON": 1} and not rows_of(shard)
    with pytest.raises(UserError, match=r"line 1: is not JSON: .*or set convert\.bad_rows: drop"):
        run_convert(tmp_path / "stop", source(tmp_path / "stop/rows", cut), TOKENIZER)
