"""What a filter leaves out says nothing of the rows that stay: not of their format either."""

import json
from pathlib import Path
from typing import Any

from stages.convert import STAGE, ConvertPart
from stages.formats import auto
from stages.runtime import Runtime
from stages.stage import Work
from stages.tables import read_table

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


def test_a_shard_of_which_nothing_stays_has_the_format_of_its_rows(tmp_path: Path) -> None:
    facts, texts = converted(tmp_path, [{"kind": "web", "text": "page"}], filter='kind == "chat"')
    assert facts["formats"] == {"completion": 1} and facts["dropped"] == {"filtered": 1} and not texts
