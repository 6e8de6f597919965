"""GRPO for several rewards (GDPO, arXiv:2601.05242), through TRL's trainer.

GRPO adds the rewards up and normalises the sum in its group, where a reward with small steps drowns in one with large
ones. Here each reward is normalised in its group first, so that its weight alone says how much it counts:

    r_k  (reward k - its mean in the group) / its standard deviation in the group
    A    sum over k of weight_k r_k, then normalised over the batch
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from stages.objectives import Objective, Online
from stages.objectives.grpo import GroupOptions, group_settings


class GdpoOptions(GroupOptions):
    """Settings of group reward-decoupled normalization policy optimization."""

    @model_validator(mode="after")
    def _several(self) -> Self:
        if len(self.rewards) + bool(self.environment) < 2:
            raise ValueError("gdpo is for several rewards: name another one, or choose grpo")
        return self


def settings(options: GdpoOptions) -> Mapping[str, Any]:
    """TRL's arguments."""
    return {**group_settings(options), "multi_objective_aggregation": "normalize_then_sum"}


OBJECTIVE = Objective(version=5, options=GdpoOptions, kinds=("prompt",), online=Online("GRPOTrainer", settings))
