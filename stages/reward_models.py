"""Reward models at work: what models of the objectives `reward` and `process_reward` say that an answer is worth.

They read a text of their own, for whoever wrote the answer: the conversation through their own chat template and their
own tokenizer. A model of `reward` gives the whole answer one number, read at its last token: no share of anything, but
of any size and sign, whose differences are the log-odds of being preferred (`stages.objectives.reward`). A process
reward model gives each step the probability that it is right, read at the step's last token; what the answer is worth
is those combined, from 0 to 1.

`fetch.reward_models` brings such models in by a name: train's rewards and evaluate's tasks ask them by that name, and
their keys have what the model is, wherever it lies.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from stages.errors import UserError
from stages.generation import Turn

VERSION = 1
"""Bumped when the same answer would be worth another number: it enters the key of what is scored in evaluate."""

SEPARATOR = "step_separator"
"""The entry of a process reward model's config.json, and of its data's counts.json, that says what closed each step."""

Steps = Literal["min", "product", "mean", "last"]
"""How the probabilities of an answer's steps become what it is worth: the least likely step's (arXiv:2312.08935), that
all are right (arXiv:2305.20050, section 2.6), their mean, or the last step's (arXiv:2408.03314)."""

_COMBINED: Mapping[Steps, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "mean": fmean,
    "last": lambda right: right[-1],
}

MARK = "\u2060question\u2060"
ASKED: Sequence[Turn] = ({"role": "user", "content": MARK},)
"""A conversation that shows what a chat template writes after a question, whatever the question is."""


def judges_steps(folder: Path) -> bool:
    """Whether the folder holds a process reward model."""
    return _kind(folder).endswith("ForTokenClassification")


def check(folder: Path, place: str) -> None:
    """Raise UserError unless the folder holds a model that gives a conversation one number, or each step of an answer
    a choice between wrong and right. Reads two small files."""
    config = _config(folder)
    kind, steps = _kind(folder), judges_steps(folder)
    mend = "name the folder that a recipe with `train.objective: reward` or `process_reward` published"
    if not steps and not kind.endswith("ForSequenceClassification"):
        raise UserError(f"{place}: is no reward model but {kind}: {mend}")
    labels = len(config.get("id2label") or ("no", "yes"))  # transformers writes them down unless there are two
    if not steps and labels != 1:
        raise UserError(f"{place}: sorts texts into {labels} labels, and a reward is one number: {mend}")
    if steps and labels != 2:
        raise UserError(f"{place}: sorts tokens into {labels} labels, and a step is wrong or right: {mend}")
    if steps and (swapped := _swapped(config.get("id2label") or {})):
        raise UserError(
            f"{place}: its label {swapped} in config.json, and label 0 is to be a wrong step, label 1 a right one: "
            "swap the two rows of its head's weight and bias, and its labels"
        )
    separator = config.get(SEPARATOR)
    if steps and not (isinstance(separator, str) and separator):
        raise UserError(
            f"{place}: its config.json does not say where steps end. Add what closed each step of its training data, "
            f'e.g. "{SEPARATOR}": "\\n"; what regrow merges has it: a model that it made earlier is merged again by '
            "`regrow run`, without being trained again. One that was trained on raw text alone (`wording: text`) has "
            "none, because it never saw the chat template that it would be asked through: train it on chats"
        )
    settings = folder / "tokenizer_config.json"
    told = settings.is_file() and json.loads(settings.read_text("utf-8")).get("chat_template")
    if not told and not (folder / "chat_template.jinja").is_file():
        raise UserError(f"{place}: has no chat template (chat_template.jinja), so it cannot be shown a conversation")


def refuse_steps(folder: Path, place: str) -> None:
    """Raise UserError where `steps` stands at that place of the recipe, and the folder's model knows none."""
    if not judges_steps(folder):
        raise UserError(
            f"{place}: this reward model gives a whole answer one number, and only a process reward model judges "
            "steps: take `steps` out, or name one that a recipe with `train.objective: process_reward` published"
        )


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return found


def _kind(folder: Path) -> str:
    return str((_config(folder).get("architectures") or ["nothing"])[0])


RIGHT = ("right", "correct", "good", "positive", "yes")
WRONG = ("wrong", "incorrect", "bad", "negative", "no")


def _swapped(labels: Mapping[str, Any]) -> str:
    """Which of two labels by number says the opposite of what it stands for, as `0 is 'right'`; empty for none."""
    for number, others in (("0", RIGHT), ("1", WRONG)):
        if str(labels.get(number, "")).strip().lower() in others:
            return f"{number} is {labels[number]!r}"
    return ""


def of(folder: Path, network: Any, tokenizer: Any, steps: Steps | None) -> "RewardModel":
    """The model of a folder that was checked, from its loaded parts. `steps` says how a process reward model's combine,
    `min` where it is None."""
    return prepared(folder, tokenizer, steps)(network)


def prepared(folder: Path, tokenizer: Any, steps: Steps | None) -> "Callable[[Any], RewardModel]":
    """The same before its network is loaded, which it then takes: what cannot be read of the folder is told by now."""
    if not judges_steps(folder):
        return lambda network: RewardModel(network, tokenizer)
    from stages import chat_template, encoding, tokenizer_files

    template = chat_template.load(tokenizer_files.read_tokenizer(folder), "tokenizer")
    encoder = encoding.load(tokenizer.backend_tokenizer.to_str(), template.control, fast=False)
    separator = _config(folder)[SEPARATOR]
    return lambda network: ProcessRewardModel(network, tokenizer, encoder, separator, steps or "min")


@dataclass(frozen=True)
class RewardModel:
    """Weights and tokenizer, in evaluation mode."""

    network: Any
    """transformers' sequence classifier with one label."""
    tokenizer: Any

    @cached_property
    def opening(self) -> str:
        """What its chat template writes between a question and its answer."""
        return text_of(self.tokenizer, ASKED).partition(MARK)[2]

    def worth(self, turns: Sequence[Turn], answer: str) -> float:
        """The reward of an answer to a conversation. Raises ValueError for what it cannot read: too long a text, or
        turns that its chat template does not take."""
        return self._of_text(text_of(self.tokenizer, turns, answer))

    def worth_after(self, prompt: str, answer: str) -> float:
        """The same after a rendered prompt. Raises ValueError also where another chat template has rendered it."""
        # The template writes the answer, as it did in training: it may trim it, or open it with an empty reasoning.
        answered = text_of(self.tokenizer, ASKED, answer).partition(MARK)[2]
        return self._of_text(self._opened(prompt).removesuffix(self.opening) + answered)

    def _opened(self, prompt: str) -> str:
        if not prompt.endswith(self.opening):
            raise ValueError(
                f"its chat template opens an answer with {self.opening!r}, and the prompt ends {prompt[-40:]!r}"
            )
        return prompt

    def _of_text(self, text: str) -> float:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.network.config.get_text_config().pad_token_id = None  # one text at a time: its last token is the last
        return float(self._logits(ids)[0])

    def _logits(self, ids: Sequence[int]) -> Any:
        """What the head gives a text of these tokens: [labels], or [tokens, labels]."""
        import torch

        most = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and len(ids) > most:
            raise ValueError(f"the reward model reads {most} tokens at most; question and answer have {len(ids)}")
        with torch.inference_mode():
            return self.network(torch.tensor([list(ids)], device=self.network.device)).logits[0]


@dataclass(frozen=True)
class ProcessRewardModel(RewardModel):
    """The same for one that judges steps: transformers' token classifier with two labels, wrong and right."""

    encoder: Any
    """Of its tokenizer (`stages.encoding.Encoder`)."""
    separator: str
    """What closed each step of its training data."""
    steps: Steps
    """How what it gives the steps becomes what the answer is worth."""

    def worth(self, turns: Sequence[Turn], answer: str) -> float:
        """What an answer is worth, from 0 to 1; 0 where it has no step. Raises ValueError as `RewardModel` does."""
        return self._combined(text_of(self.tokenizer, turns), answer)

    def worth_after(self, prompt: str, answer: str) -> float:
        """The same after a rendered prompt."""
        return self._combined(self._opened(prompt), answer)

    def _combined(self, prompt: str, answer: str) -> float:
        right = self.right(prompt, answer)
        return float(_COMBINED[self.steps](right)) if right else 0.0

    def right(self, prompt: str, answer: str) -> list[float]:
        """The probability that each step of an answer after a rendered prompt is right, in one pass."""
        from stages import steps

        found = steps.cut(answer, self.separator)
        if not found:
            return []
        ids, ends = steps.tokens(self.encoder, prompt, found, self.separator)
        right: list[float] = self._logits(ids)[ends].float().softmax(-1)[:, 1].tolist()
        return right


def text_of(tokenizer: Any, turns: Sequence[Turn], answer: str | None = None) -> str:
    """The conversation with that answer, or up to where one begins, as a reward model with this tokenizer was trained
    to read it. Raises ValueError for one that its chat template does not take."""
    from jinja2 import TemplateError

    answered = [*turns, *([] if answer is None else [{"role": "assistant", "content": answer}])]
    try:
        return str(tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=answer is None))
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in answered)
        raise ValueError(f"the reward model's chat template does not take the turns {roles}: {error}") from error
