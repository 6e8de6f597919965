"""A reward model at work: what a model of the objective `reward` says that an answer is worth.

It reads a text of its own, for whoever wrote the answer: the conversation through its own chat template and its own
tokenizer. What it gives at the last token is the reward: no share of anything, but a number that may be of any size and
sign, whose differences are the log-odds of being preferred (`stages.objectives.reward`).

`fetch.reward_models` brings such models in by a name: train's rewards and evaluate's tasks ask them by that name, and
their keys have what the model is, wherever it lies.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.generation import Turn
from stages.identity import Json

VERSION = 1
"""Bumped when the same answer would be worth another number: it enters the key of what is scored in evaluate."""

MARK = "\u2060answer\u2060"


def check(folder: Path, place: str) -> None:
    """Raise UserError unless the folder holds a model that gives a conversation one number. Reads two small files."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kind = str((config.get("architectures") or ["nothing"])[0])
    mend = "name the folder that a recipe with `train.objective: reward` published"
    if kind.endswith("ForTokenClassification"):
        raise UserError(
            f"{place}: a process reward model ({kind}) judges steps one by one, and an answer is one text: {mend}"
        )
    if not kind.endswith("ForSequenceClassification"):
        raise UserError(f"{place}: is no reward model but {kind}: {mend}")
    labels = len(config.get("id2label") or ("no", "yes"))  # transformers writes them down unless there are two
    if labels != 1:
        raise UserError(f"{place}: sorts texts into {labels} labels, and a reward is one number: {mend}")
    settings = folder / "tokenizer_config.json"
    told = settings.is_file() and json.loads(settings.read_text("utf-8")).get("chat_template")
    if not told and not (folder / "chat_template.jinja").is_file():
        raise UserError(f"{place}: has no chat template (chat_template.jinja), so it cannot be shown a conversation")


@dataclass(frozen=True)
class RewardModel:
    """Weights and tokenizer, in evaluation mode."""

    network: Any
    """transformers' sequence classifier with one label."""
    tokenizer: Any

    def around(self) -> tuple[str, str]:
        """What its chat template writes between a question and its answer, and after an answer."""
        asked = [{"role": "user", "content": MARK}]
        opened = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return opened.rpartition(MARK)[2], text_of(self.tokenizer, asked, MARK).rpartition(MARK)[2]

    def worth(self, text: str) -> float:
        """The reward of a text: what the head gives at its last token. Raises ValueError for one that is too long."""
        import torch

        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        most = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and ids.shape[1] > most:
            raise ValueError(f"the reward model reads {most} tokens at most; question and answer have {ids.shape[1]}")
        self.network.config.pad_token_id = None  # one text at a time: its last token is the last
        with torch.inference_mode():
            return float(self.network(ids.to(self.network.device)).logits[0, 0])


def text_of(tokenizer: Any, turns: Sequence[Turn], answer: str) -> str:
    """The conversation with that answer, as a reward model with this tokenizer was trained to read it. Raises
    ValueError for one that its chat template does not take."""
    from jinja2 import TemplateError

    answered = [*turns, {"role": "assistant", "content": answer}]
    try:
        return str(tokenizer.apply_chat_template(answered, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in answered)
        raise ValueError(f"the reward model's chat template does not take the turns {roles}: {error}") from error


def turns_of(row: tuple[str, Mapping[str, Json]], field: str) -> list[Turn]:
    """The turns that a row asks: its `field`, a text or a list of messages, or else its `messages`; without the
    assistant's answer where they end with one. Raises UserError naming the row that has neither."""
    place, values = row
    asked = values.get(field, values.get("messages"))
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    if not isinstance(asked, list):
        found = f"holds a {type(asked).__name__}" if field in values else f"has only {', '.join(values)}"
        raise UserError(
            f"{place}: a question is a text or a list of messages in the field {field!r}, and the row {found}. "
            "Name the right field with `question:` in the task"
        )
    turns = [_turn(place, message) for message in asked]
    if turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] != "user":
        roles = [turn["role"] for turn in turns]
        raise UserError(f"{place}: the model answers a user's turn, and the messages before the answer are {roles}")
    return turns


def _turn(place: str, message: Json) -> Turn:
    told = message if isinstance(message, dict) else {}
    role, content = told.get("role"), told.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{place}: a message is {{role: text, content: text}}, and one here is {message!r:.200}")
    return {"role": role, "content": content}
