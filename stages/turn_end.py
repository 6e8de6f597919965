"""Where an answer ends: the token that ends the assistant's turn in a model's chat template.

A model that is trained through ChatML ends what it says with `<|im_end|>`, also where its tokenizer's end of a text is
`<|endoftext|>`. What generates stops at the ids of generation_config.json, so the turn's end has to be among them.
"""

import json
from contextlib import suppress
from pathlib import Path

from stages.errors import UserError


def turn_end(folder: Path, template: str = "tokenizer") -> int | None:
    """The id of the token that ends the assistant's turn in the chat template of a model's folder, or in another one's
    text. None where there is no template, and where a turn ends otherwise: in nothing, or in words, which an answer may
    hold as well."""
    from stages import chat_template
    from stages.tokenizer_files import read_tokenizer

    with suppress(UserError):  # a tokenizer or a template that cannot be asked ends no turn that we know of
        tokenizer = read_tokenizer(folder)
        end = chat_template.load(tokenizer, template).answer_end.strip()
        if end in tokenizer.added:
            added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
            return int(next(token["id"] for token in added if token["content"] == end))
    return None


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
