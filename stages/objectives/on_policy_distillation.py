"""On-policy distillation (GKD, arXiv:2306.13649), through TRL's trainer: a student learns from its own completions.

The student writes a completion to every prompt, and is drawn to what the teacher expects in the place of each of its
tokens. With p the teacher's and q the student's distribution over all tokens, both at `temperature`, and
m = beta p + (1 - beta) q, a token's loss is the generalised Jensen-Shannon divergence

    beta KL(p || m) + (1 - beta) KL(q || m)

but for the ends, where it would vanish: beta 0 is the forward divergence KL(p || q), beta 1 the reverse one,
KL(q || p), that of MiniLLM (arXiv:2306.08543) token by token. The mean is over the tokens of a step's completions; no
gradient goes through the sampling.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from stages.objectives import Objective, Online
from stages.objectives.grpo import SampledOptions, sampling_settings


class OnPolicyOptions(SampledOptions):
    """Settings of on-policy distillation. The temperature is that of sampling and of both distributions."""

    beta: float = Field(default=1.0, ge=0, le=1)
    """The divergence: 0 is the forward one, which covers all that the teacher may say, 1 the reverse one, which leaves
    out what the teacher would not say, 0.5 that of Jensen and Shannon."""
    student_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the steps whose completions the student writes (the paper's lambda), drawn by the seed; in the others
    the teacher writes them."""


def settings(options: OnPolicyOptions) -> Mapping[str, Any]:
    """TRL's arguments."""
    return {**sampling_settings(options), "beta": options.beta}


OBJECTIVE = Objective(
    version=3,
    options=OnPolicyOptions,
    kinds=("prompt",),
    online=Online("DistillationTrainer", settings, teacher=True),
)
