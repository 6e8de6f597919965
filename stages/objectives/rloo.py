"""REINFORCE with a leave-one-out baseline (arXiv:2402.14740), through TRL's trainer: a completion's advantage is its
reward minus the mean reward of the other completions to its prompt."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from stages.objectives import Objective, Online
from stages.objectives.grpo import RewardedOptions, reward_settings


class RlooOptions(RewardedOptions):
    """Settings of REINFORCE leave-one-out."""

    beta: float = Field(default=0.05, ge=0)
    """Weight of the divergence from the model before training, which is taken off the reward."""
    normalize_advantages: bool = False
    """Bring a batch's advantages to mean 0 and standard deviation 1."""

    @model_validator(mode="after")
    def _as_trl_has_it(self) -> Self:
        if self.environment:
            raise ValueError("environment: rloo has none in TRL: choose grpo or gdpo")
        if self.vllm and self.vllm.asynchronous:
            # TRL's loss takes the probabilities of now for those of sampling.
            raise ValueError("vllm.asynchronous: rloo does not correct for older weights: choose grpo or gdpo")
        return self


def settings(options: RlooOptions) -> Mapping[str, Any]:
    """TRL's arguments."""
    own = {"beta": options.beta, "normalize_advantages": options.normalize_advantages}
    return {**reward_settings(options), **own}


OBJECTIVE = Objective(version=4, options=RlooOptions, kinds=("prompt",), online=Online("RLOOTrainer", settings))
