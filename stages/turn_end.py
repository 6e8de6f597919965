"""Where an answer begins and ends: what closes the assistant's reasoning in a model's chat template, and the token that
ends its turn.

A model that is trained through ChatML ends what it says with `<|im_end|>`, also where its tokenizer's end of a text is
`<|endoftext|>`. What generates stops at the ids of generation_config.json, so the turn's end has to be among them.
One that is trained through Qwen 3's template begins with `<think>`, also where it has nothing to think about, and what
it answers comes after `</think>`.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.errors import UserError

ANY_DAY = datetime.date(2000, 1, 1)
"""For templates that ask for the date: it changes no mark."""


def answer_marks(folder: Path, template: str = "tokenizer") -> tuple[str, int | None]:
    """What closes the assistant's reasoning in the chat template of a model's folder, or in another one's text, and the
    id of the token that ends its turn. Empty where there is no template, and where it knows no reasoning; None where
    a turn ends otherwise: in nothing, or in words, which an answer may hold as well."""
    from stages import chat_template
    from stages.tokenizer_files import read_tokenizer

    try:
        tokenizer = read_tokenizer(folder)
        known = chat_template.load(tokenizer, template, ANY_DAY)
    except UserError:  # a tokenizer or a template that cannot be asked marks nothing that we know of
        return "", None
    if not known.answer_end:
        return known.thought_end, None
    added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    return known.thought_end, int(next(token["id"] for token in added if token["content"] == known.answer_end))


def turn_end(folder: Path, template: str = "tokenizer") -> int | None:
    """The id of the token that ends the assistant's turn: see `answer_marks`."""
    return answer_marks(folder, template)[1]


def after_thought(tokenizer: Any, ids: Sequence[int], mark: str) -> str:
    """The text of what a model wrote, without its special tokens and without what stands before the last `mark`, which
    closes its reasoning. All of it where there is none: reasoning that is never closed is the answer."""
    if mark:
        # Decoded with special tokens, of which the mark may be made; these are then taken out as decoding does it.
        _, found, said = tokenizer.decode(ids).rpartition(mark)
        if found:
            for token in tokenizer.added_tokens_decoder.values():
                said = said.replace(token.content, "") if token.special else said
            return str(said.lstrip())
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def with_end(ids: int | list[int] | None, end: int | None) -> list[int]:
    """`eos_token_id` of a generation config as a list, with the turn's end in it."""
    known = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return known if end is None or end in known else [*known, end]


def put_end(folder: Path) -> None:
    """Make what generates from a model's folder stop where a turn of its chat template ends: write that token into
    generation_config.json, which stays as it is where it has the token already."""
    from transformers import AutoConfig, GenerationConfig

    end = turn_end(folder)
    if end is None:
        return
    path = folder / "generation_config.json"
    if path.is_file():
        settings = json.loads(path.read_text("utf-8"))
    else:  # what transformers takes where there is no file
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        settings = GenerationConfig.from_model_config(config).to_diff_dict()
        settings.pop("transformers_version", None)
    known = settings.get("eos_token_id")
    ids = with_end(known, end)
    if ids == with_end(known, None):
        return
    settings.pop("_from_model_config", None)  # or transformers 4 makes it anew from config.json
    path.write_text(json.dumps({**settings, "eos_token_id": ids}, indent=2, sort_keys=True) + "\n", "utf-8")
