"""Chat templates that TRL ships: what they write is transformers' text, and what trains is what the prompt lacks."""

import datetime
import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.formats import BadRow, Options, find
from stages.rendering import render
from tests.stages.test_rendering import CONTROL, before_half_a_token, check_cover, parts, template, transformers_text

TRL = importlib.util.find_spec("trl")
TAGS = re.compile(r"</?[a-z_]+>|<[|｜][^<>{}'\" ]+[|｜]>|\[/?[A-Z_]+\]")
"""What looks like a control token in a template."""
SHIPPED = sorted(Path(str(TRL.origin)).parent.glob("chat_templates/*.jinja")) if TRL else []
QUESTION: dict[str, Any] = {"role": "user", "content": "hi <|im_end|> "}
ASKED: list[dict[str, Any]] = [
    {
        "role": "assistant",
        "tool_calls": [
            {
                "id": "123456789",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": 'P"aris', "n": 3}},
            }
        ],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "123456789", "content": '{"t": 20}'},
    {"role": "assistant", "content": "It is 20."},
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": [QUESTION, {"role": "assistant", "content": " hello\n"}, QUESTION, {"role": "assistant", "content": "é"}],
    "system": [{"role": "system", "content": "s"}, QUESTION, {"role": "assistant", "content": "hello"}],
    "reasoning": [QUESTION, {"role": "assistant", "content": "hello", "reasoning_content": "let me see"}],
    "inline reasoning": [QUESTION, {"role": "assistant", "content": "<think>\nlet me see\n</think>\n\nhello"}],
    "tools": [QUESTION, *ASKED],
}
SCHEMA = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "W <of> a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "née"}}},
        },
    }
]


@pytest.mark.skipif(not SHIPPED, reason="needs the templates that trl ships: pip install trl")
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_templates_of_many_models_write_what_they_write_in_transformers(path: Path) -> None:
    """Some seventy templates of real models, from trl. Each must load, or be one that wants pictures."""
    source = path.read_text("utf-8")
    try:
        loaded = template(source, datetime.date.today(), tuple(sorted({*TAGS.findall(source)} - {*CONTROL})))
    except UserError as error:
        assert "leaves out what the user says" in str(error), error
        assert "image" in source
        return
    for name, chat in CHATS.items():
        tools = SCHEMA if name == "tools" else None
        conversation = find("messages").convert({"messages": chat, "tools": tools}, Options())
        try:
            rendered = render(loaded, conversation)
        except BadRow:
            continue
        calls = loaded.calls
        given = [{**turn, **(calls.silence if calls and "content" not in turn else {})} for turn in chat]
        if calls and calls.as_text:
            given = json.loads(json.dumps(given))
            for call in (call for turn in given for call in turn.get("tool_calls", [])):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        assert rendered.text == transformers_text(source, given, tools), name
        check_cover(rendered)
        answers = "".join(text for kind, turn, text in parts(rendered) if kind == "C" and turn == len(chat) - 1)
        assert (chat[-1]["content"].rpartition("</think>")[2].strip()) in answers
        if name == "tools" and path.stem.startswith("diffusion_gemma"):
            continue  # it has no prompt for what follows a tool's answer, though it writes a header there
        prompt = transformers_text(source, given[:-1], tools, add_generation_prompt=True)
        data, own = rendered.text.encode(), [span for span in rendered.spans if span.turn == len(chat) - 1]
        same = (one == other for one, other in zip(prompt.encode(), data, strict=False))
        shared = before_half_a_token(sum(itertools.takewhile(bool, same)), prompt, rendered.text, loaded.control)
        # What the prompt gives does not train, and all that follows does, unless the row itself says `<think>` again.
        assert own[0].start == shared or (name, data[own[0].start : shared]) == ("inline reasoning", b"<think>\n")
        # Phi-3's writes one more token after the last turn of all, which ends none.
        trailing = ("", "</s>") if path.stem.startswith("phi3") else ("",)
        assert data[own[-1].end :].decode().strip() in trailing, name
