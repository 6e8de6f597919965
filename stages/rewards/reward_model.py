"""What a reward model gives the prompt with the completion: one of `fetch.reward_models`, by its name there.

It reads the prompt as the model that trains read it, so both must have the same chat template; its tokens are its own.
"""

from collections.abc import Mapping
from pathlib import Path

from stages import arithmetic
from stages.reward_models import RewardModel
from stages.rewards import Reward, Row
from stages.stage import StageConfig


class Options(StageConfig):
    """Which reward model."""

    model: str
    """Its name in `fetch.reward_models`."""


_ready: dict[str, tuple[RewardModel, str, str]] = {}
"""By name: the model, and what its chat template writes before and after an answer."""


def ready(options: Options, models: Mapping[str, Path]) -> None:
    """Load the model before the first completion comes, whose time limit it would take."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    place = models[options.model]
    stored = AutoConfig.from_pretrained(place, local_files_only=True).dtype
    emulated = stored == torch.bfloat16 and not arithmetic.cpu_has_bf16()
    network = AutoModelForSequenceClassification.from_pretrained(
        place, dtype=torch.float32 if emulated else "auto", local_files_only=True
    ).eval()
    model = RewardModel(network, AutoTokenizer.from_pretrained(place, local_files_only=True))
    _ready[options.model] = (model, *model.around())


def score(completion: str, row: Row, options: Options) -> float:
    """The reward, as the model has it: not bounded, and not centred unless it was trained so."""
    model, opening, end = _ready[options.model]
    prompt = str(row["rendered_prompt"])
    if not prompt.endswith(opening):
        raise ValueError(f"its chat template opens an answer with {opening!r}, and the prompt ends {prompt[-40:]!r}")
    return model.worth(prompt + completion + end)


REWARD = Reward(2, score, Options, model=lambda options: options.model, ready=ready)
