"""A teacher beside the model while it trains: loaded, proven to speak of the same tokens, and sampled from at times."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages import heads
from stages.errors import UserError
from stages.generation import load_network
from stages.generation_settings import keep_tokens
from stages.tokenizer_files import refuse_other_words
from stages.train import TrainConfig

Keep = Callable[[int, Sequence[str], Sequence[str]], None]
"""Takes the steps that are done, and the prompts and completions of the next one."""


def refuse(config: TrainConfig, inputs: Mapping[str, Path]) -> None:
    """Raise UserError for a teacher that its files say is none for `inputs["model"]`."""
    if "teacher" not in inputs:
        raise UserError(f"train: {config.objective} needs a teacher: set fetch.teacher")
    refuse_other_words(inputs["teacher"], inputs["model"])
    if heads.classifier(inputs["teacher"]):
        raise UserError("fetch.teacher is a classifier, which expects no next token: take a language model")


def load(config: TrainConfig, inputs: Mapping[str, Path], device: str, trained: Any) -> Any:
    """The teacher, on the device, resting. Raises UserError when it gives fewer tokens than the model that is to be
    `trained`, or that one has an adapter on its head."""
    if type(trained.get_output_embeddings()) is not torch.nn.Linear:
        raise UserError(
            f"train: {config.objective} reads the weights of lm_head themselves, past an adapter that stands there: "
            "take it out of train.lora.targets, modules_to_save and new_tokens"
        )
    network = load_network(
        inputs["teacher"],
        "bf16" if config.precision == "bf16" else "fp32",
        "cuda" if device == "cuda" else "cpu",
        packed=False,
    )
    keep_tokens(network)
    theirs, ours = (each.get_output_embeddings().weight.shape[0] for each in (network, trained))
    if theirs < ours:
        raise UserError(
            f"fetch.teacher gives {theirs} tokens a probability and fetch.model {ours}, though their tokenizers are "
            "alike: take a teacher with as many or more"
        )
    if theirs > ours:  # rows that no token has: models of a family are padded to sizes of their own
        network.resize_token_embeddings(ours)
    return network.requires_grad_(False)


def sampling(kind: type, share: float, seed: int, keep: Keep) -> type:
    """TRL's distillation trainer `kind` in which the student writes the completions of only a `share` of the steps, the
    teacher those of the others, and all are kept."""

    class Trainer(kind):  # type: ignore[misc]
        model_wrapped: Any

        def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **more: Any) -> list[list[int]]:
            step, student = self.state.global_step, self.model_wrapped
            # Drawn by the step, so that a run that goes on draws the same.
            if np.random.default_rng((seed, step, 1)).random() >= share:
                self.model_wrapped = self.teacher_model
            try:
                written: list[list[int]] = super()._generate_single_turn(prompt_ids, *others, **more)
            finally:
                self.model_wrapped = student
            tokenizer = self.processing_class
            keep(step, tokenizer.batch_decode(prompt_ids), tokenizer.batch_decode(written, skip_special_tokens=True))
            return written

    return Trainer
