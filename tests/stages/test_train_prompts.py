"""Where completions end that a model writes while it trains."""

import shutil
from pathlib import Path

from stages.train import prompts
from tests.stages.chatting import chat_model

__all__ = ["chat_model"]


def test_a_completion_ends_where_a_turn_of_the_template_does(chat_model: Path, tmp_path: Path) -> None:
    """Also where the tokenizer's texts end in another token: TRL knows one end, the tokenizer's."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(chat_model, tmp_path / "ends_otherwise")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    assert prompts.plain_tokenizer(folder).eos_token == "<|im_end|>"
    assert prompts.plain_tokenizer(folder).pad_token == "<|im_start|>"
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    assert prompts.plain_tokenizer(folder).eos_token == "<|im_start|>"
