"""What a reward model gives the prompt with the completion: the folder that the objective `reward` publishes.

It reads the prompt as the model read it, so both must have the same chat template.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import model_validator

from stages.rewards import Reward, Row
from stages.stage import StageConfig

FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "chat_template.jinja")
MARK = "\u2060answer\u2060"


class Options(StageConfig):
    """Which reward model."""

    model: str
    """Its folder."""
    digest: str = ""
    """Of its files: sha256, found when the recipe is read. Another model in that folder is another reward."""

    @model_validator(mode="before")
    @classmethod
    def _look(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("digest") or not isinstance(values.get("model"), str):
            return values
        folder = Path(values["model"]).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(f"model: {folder} holds no model (looked from {Path.cwd()})")
        if "ForSequenceClassification" not in (folder / "config.json").read_text("utf-8"):
            raise ValueError(f"model: {folder} is no reward model: publish one with `train.objective: reward`")
        return {**values, "digest": _digest(folder)}


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    return found.hexdigest()


def ready(options: Options) -> None:
    """Load the model before the first completion comes, whose time limit it would take."""
    _loaded(options.model)


def score(completion: str, row: Row, options: Options) -> float:
    """The reward, as the model has it: not bounded, and not centred unless it was trained so."""
    import torch

    model, tokenizer, opening, end = _loaded(options.model)
    prompt = str(row["rendered_prompt"])
    if not prompt.endswith(opening):
        raise ValueError(f"its chat template opens an answer with {opening!r}, and the prompt ends {prompt[-40:]!r}")
    ids = tokenizer(prompt + completion + end, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return float(model(ids).logits[0, 0])


@cache
def _loaded(folder: str) -> tuple[Any, Any, str, str]:
    """The model, its tokenizer, and what its chat template writes before and after an answer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = Path(folder).expanduser()
    model = AutoModelForSequenceClassification.from_pretrained(place, local_files_only=True).eval()
    model.config.pad_token_id = None  # one text at a time: its last token is the last
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    turns = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template(turns, tokenize=False)
    return model, tokenizer, asked.rpartition(MARK)[2], answered.rpartition(MARK)[2]


REWARD = Reward(1, score, Options, ready=ready)
