"""What a reward model gives the prompt with the completion: one of `fetch.reward_models`, by its name there.

It reads the prompt as the model that trains read it, so both must have the same chat template; its tokens are its own.
A process reward model judges the completion step by step, and `steps` says how those judgements become one number.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stages import arithmetic, reward_models, weight_files
from stages.reward_models import RewardModel, Steps
from stages.rewards import Reward, Row
from stages.stage import StageConfig


class Options(StageConfig):
    """Which reward model."""

    model: str
    """Its name in `fetch.reward_models`."""
    steps: Steps | None = None
    """Only for a process reward model: how the probabilities that a completion's steps are right become one number. Its
    `min` when left out."""


_ready: dict[Options, RewardModel] = {}


def ready(options: Options, models: Mapping[str, Path]) -> None:
    """Load the model before the first completion comes, whose time limit it would take."""
    place = models[options.model]
    if options.steps:
        reward_models.refuse_steps(place, f"train.objective_options.rewards: the steps of {options.model}")
    _ready[options] = reward_models.of(place, *_loaded(place), options.steps)


@cache
def _loaded(place: Path) -> tuple[Any, Any]:
    """Network and tokenizer, once for all rewards that ask the model."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    from stages import heads

    emulated = weight_files.dtype(place) == torch.bfloat16 and not arithmetic.cpu_has_bf16()
    network = getattr(transformers, heads.classifier(place)).from_pretrained(
        place, dtype=torch.float32 if emulated else "auto", local_files_only=True
    )
    return network.eval(), AutoTokenizer.from_pretrained(place, local_files_only=True)


def score(completion: str, row: Row, options: Options) -> float:
    """The reward, as the model has it: that of an outcome is not bounded, and not centred unless it was trained so."""
    return _ready[options].worth_after(str(row["rendered_prompt"]), completion)


REWARD = Reward(3, score, Options, model=lambda options: options.model, ready=ready)
