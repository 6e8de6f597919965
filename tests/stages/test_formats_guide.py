"""docs/formats.md: every format has its section with real-shaped rows, which convert, and are recognised as theirs.

The tables in it are made from the code: `UPDATE_DOCS=1 python -m pytest tests/stages/test_formats_guide.py`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages import convert, formats, templates
from stages.chat_template import load
from stages.formats import Example, auto
from stages.forms import Forms
from stages.marks import TRAIN_NO, TRAIN_YES
from stages.sequences import Sequencer, Written
from stages.tokenizer_files import Tokenizer
from tests import doc_tables

GUIDE = Path(__file__).parents[2] / "docs" / "formats.md"
MARKS = ("</s>", "<|im_start|>", "<|im_end|>")
TOKENIZER = Tokenizer(None, {"eos_token": MARKS[0]}, MARKS, MARKS, "")
UNRECOGNISED = {"auto", "own", "fields", "llamafactory", "vicuna"}
"""Formats that `auto` leaves alone: they need to be told something, or are another's under a second name."""


def section(name: str) -> str:
    found = re.search(rf"^### `{name}`\n(.*?)(?=^##)", GUIDE.read_text("utf-8"), re.M | re.S)
    assert found, f"docs/formats.md has no section about {name}"
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def samples(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for block in blocks(text, "jsonl") for line in block.splitlines()]


def settings_of(name: str) -> convert.ConvertPart:
    told = blocks(section(name), "yaml")
    given = yaml.safe_load(told[0]) if told else {"format": name}
    code = {"code": blocks(section(name), "python")[0]} if name == "own" else {}
    return convert.ConvertPart.model_validate(given | code)


def written(settings: convert.ConvertPart, rows: list[dict[str, Any]]) -> list[list[Written]]:
    reader = formats.reader(
        settings.format, settings.fields, settings.roles, settings.options, code=settings.code, rows=rows
    )
    template = load(TOKENIZER, "qwen")
    sequencer = Sequencer(reader, TOKENIZER, Forms(template), settings.reasoning)
    return [sequencer.sequences(number, reader.convert(row)) for number, row in enumerate(rows)]


@pytest.mark.parametrize("name", sorted(set(formats.names()) - {"auto"}))
def test_every_format_has_a_sample_that_it_reads(name: str) -> None:
    rows = samples(section(name))
    assert rows, f"docs/formats.md shows no row of {name}"
    assert all(written(settings_of(name), rows))


@pytest.mark.parametrize("name", sorted(set(formats.names()) - UNRECOGNISED))
def test_auto_recognises_every_sample(name: str) -> None:
    rows = samples(section(name))
    assert auto.recognise(rows) == (name, {})
    for row in rows:
        assert {one for one, _ in auto.candidates(row)} == {name}, "each row on its own, too"


def test_the_samples_about_what_trains_do_so() -> None:
    guide = GUIDE.read_text("utf-8")
    rows = samples(guide[guide.index("## What trains") :])
    said = []
    for sequences in written(convert.ConvertPart(format="messages"), rows):
        data = sequences[0].rendered.text.encode()
        spans = [span for span in sequences[0].rendered.spans if span.role == "assistant" and span.train == TRAIN_YES]
        said.append("".join(data[span.start : span.end].decode() for span in spans))
    assert said == ["No, it is 5.<|im_end|>", "5.<|im_end|>"]


def formats_table() -> str:
    lines = ["| format | rows of kind | columns and fields | options |", "| --- | --- | --- | --- |"]
    messages = formats.find("messages").fields
    for name in formats.names():
        form = formats.find(name)
        kind = form.kind if isinstance(form.kind, str) else "conversation, preference or unpaired_preference"
        kind = {"auto": "as it recognises", "own": "as the file says"}.get(name, kind)
        shares = name != "messages" and "tool_calls" in form.fields
        fields = ", ".join(f"`{field}`" for field in sorted(form.fields - messages if shares else form.fields))
        fields = f"those of `messages`; {fields}" if shares else fields
        options = ", ".join(f"`{option}`" for option in form.options.model_fields)
        lines.append(f"| `{name}` | {kind} | {fields} | {options} |")
    return "\n".join(lines)


def templates_table() -> str:
    lines = ["| template | models | end | system | tools | reasoning |", "| --- | --- | --- | --- | --- | --- |"]
    for name in templates.names():
        one = templates.find(name)
        has = " | ".join("yes" if value else "" for value in (one.system, one.tools, one.reasoning))
        lines.append(f"| `{name}` | {one.models} | `{one.end}` | {has} |")
    return "\n".join(lines)


@pytest.mark.parametrize(("name", "table"), [("formats", formats_table), ("templates", templates_table)])
def test_the_tables_say_what_the_code_has(name: str, table: Any) -> None:
    doc_tables.check(GUIDE, name, table(), __file__)


def test_prompts_do_not_train_and_answers_may() -> None:
    for name in ("prompt_completion", "preference", "unpaired_preference", "prompt_only", "stepwise"):
        for sequences in written(settings_of(name), samples(section(name))):
            for one in sequences:
                spans = [span for span in one.rendered.spans if span.role]
                assert all(span.train == TRAIN_NO for span in spans if span.role in ("user", "system")), name
                free = {span.turn for span in spans if span.train != TRAIN_NO}
                assert free == (set() if name == "prompt_only" else {s.turn for s in spans if s.turn >= min(free)}), (
                    name
                )


def test_what_is_written_for_rows_of_several_sequences() -> None:
    pair = written(settings_of("preference"), samples(section("preference")))[0]
    assert [one.part for one in pair] == [0, 1] and pair[0].identity == pair[1].identity
    assert json.loads(pair[0].extra) == {"margin": 1.5} and pair[0].extra == pair[1].extra
    assert pair[0].rendered.text.endswith("Blue.<|im_end|>\n") and pair[1].rendered.text.endswith("Seven.<|im_end|>\n")
    [[judged]] = written(settings_of("stepwise"), samples(section("stepwise")))
    assert json.loads(judged.extra) == {"labels": [True, False, False]}
    steps = {span.turn for span in judged.rendered.spans if span.role == "text" and span.train != TRAIN_NO}
    assert len(steps) == 3 and judged.rendered.text.endswith(
        "<|im_start|>assistant\n" + "\n".join(samples(section("stepwise"))[0]["completions"]) + "\n"
    )
    [[asked], _] = written(settings_of("prompt_only"), samples(section("prompt_only")))
    assert json.loads(asked.extra) == {"answer": "14", "level": 1, "tags": ["arithmetic"]}
    assert asked.rendered.text.endswith("<|im_start|>assistant\n")
    [[good], _] = written(settings_of("unpaired_preference"), samples(section("unpaired_preference")))
    assert json.loads(good.extra) == {"label": True}
    made = formats.reader("llamafactory", {}, {}, settings_of("llamafactory").options)
    assert made.kind == "preference" and isinstance(made.convert(samples(section("llamafactory"))[0]), Example)
