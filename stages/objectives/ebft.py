"""Energy-based fine-tuning (EBFT, arXiv:2603.12248), through TRL's trainer: the features of what the model writes are
to match those of the reference answer.

From a prompt and the beginning of its answer, at every `stride`-th token, the model writes `group_size` continuations
of `max_new_tokens`. A frozen copy of the model before training reads each; its hidden states at the last token before
the end, a quarter, half and three quarters up its layers, side by side, are the features phi. With phi* those of the
reference's own continuation, a continuation's reward is

    2 cos(phi_j, phi*) - 2 diversity mean over the others i of phi_j . phi_i

and its advantage that reward minus the mean reward of the others. With X the features of a group as rows, `whiten`
takes (X X')^(-1/2) X for X, and the same map of as many rows phi* for phi*, as the authors' code does.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from stages.objectives import Objective, Online
from stages.objectives.grpo import BALANCE, SampledOptions, sampling_settings


class EbftOptions(SampledOptions):
    """Settings of energy-based fine-tuning."""

    reference: str = "answer"
    """The column that has a prompt's answer, as a text."""
    stride: int = Field(default=8, ge=1)
    """Tokens between the places of an answer where the model goes on from."""
    max_new_tokens: int = Field(default=8, ge=1)
    """Tokens of a continuation."""
    group_size: int = Field(default=4, ge=2)
    """Continuations from each place."""
    diversity: float = Field(default=1.0, ge=0)
    """How much it counts against a continuation that the others are like it; with `whiten` only those that are the
    same are, all others being made equally unlike."""
    whiten: bool = True
    """Let all directions in which the continuations of a group differ count alike."""


def settings(options: EbftOptions) -> Mapping[str, Any]:
    """TRL's arguments."""
    return {**sampling_settings(options), **BALANCE, "num_generations": options.group_size, "beta": 0.0}


OBJECTIVE = Objective(version=3, options=EbftOptions, kinds=("prompt",), online=Online("RLOOTrainer", settings))
