"""Group relative policy optimization (arXiv:2402.03300), through TRL's trainer, and the losses that came after it.

The model writes a group of completions to every prompt; a completion's advantage is its reward against its group's.
Losses are named as TRL names them: `dapo` (arXiv:2503.14476), `dr_grpo` (arXiv:2503.20783), `cispo`
(arXiv:2506.13585), `sapo` (arXiv:2511.20347) and so on; `importance: sequence` is GSPO (arXiv:2507.18071).
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.environments import EnvironmentChoice
from stages.objectives import Objective, Online
from stages.rewards import RewardChoice
from stages.stage import StageConfig

ENVIRONMENT = "environment"
"""What the reward is called that an environment gives."""


UNREAD = {
    "cispo": ("epsilon",),
    "sapo": ("epsilon", "epsilon_high"),
    "vespo": ("epsilon", "epsilon_high", "importance"),
}
"""What a loss has no use for."""


class VllmChoice(StageConfig):
    """vLLM, which writes completions many times faster than the model that trains. It is told the new weights before
    every batch, and what still differs between the two is corrected by importance sampling."""

    mode: Literal["colocate", "server"] = "colocate"
    """Within the training's process, on its GPU; or a server started by `vllm serve`, at the runtime's `vllm_url`."""
    memory: float | None = Field(default=None, gt=0, lt=1)
    """Share of the GPU's memory that it takes where it is colocated; 0.3 when left out."""
    sleep: bool = False
    """Give that memory back while a step trains: slower, for models that need it."""
    asynchronous: bool = False
    """Let the server write the next batch while this one trains: by the weights of one batch ago, for which importance
    sampling corrects."""

    @model_validator(mode="after")
    def _of_the_server(self) -> Self:
        if self.mode == "colocate" and self.asynchronous:
            raise ValueError("asynchronous: a GPU that trains has no time to write: set mode: server beside it")
        if self.mode == "server" and (self.memory is not None or self.sleep):
            raise ValueError("memory and sleep are set where the server is started: take them out, or colocate it")
        return self


class SampledOptions(StageConfig):
    """What all objectives over the model's own completions have."""

    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts in an optimizer step, over all devices."""
    max_new_tokens: int = Field(default=256, ge=1)
    """The most tokens a completion may have. In an environment that is a whole episode with what tools answer."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of probability that is sampled from."""


class RewardedOptions(SampledOptions):
    """What objectives have that learn from rewards."""

    rewards: dict[str, RewardChoice] = Field(default_factory=dict)
    """What a completion is worth, by a name of yours; a completion's reward is their weighted sum."""
    environment: EnvironmentChoice | None = None
    """What the model acts on with tools while it writes; it may have a reward of its own."""
    vllm: VllmChoice | None = None
    """Write completions with vLLM; the model that trains writes them itself when left out."""
    group_size: int = Field(default=8, ge=2)
    """Completions to each prompt."""
    iterations: int = Field(default=1, ge=1)
    """How often each batch of completions is trained on."""
    epsilon: float = Field(default=0.2, gt=0)
    """How far a token's probability ratio may move before it is clipped."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """The same upwards; `epsilon` when left out."""
    mask_truncated: bool = False
    """Leave completions out of the loss that were cut off at `max_new_tokens`, and in an environment those whose last
    call nothing answered."""
    on_error: Literal["stop", "zero"] = "stop"
    """What to do with a completion that a reward cannot score: stop there, or count it as zero and go on."""
    reward_seconds: float = Field(default=10.0, gt=0)
    """Time limit of one reward for one completion, in seconds."""

    @model_validator(mode="after")
    def _some_reward(self) -> Self:
        if not self.rewards and not self.environment:
            raise ValueError("rewards: name at least one")
        if not self.rewards and self.reward_seconds != type(self).model_fields["reward_seconds"].default:
            raise ValueError("reward_seconds: there are no rewards: an environment's limit is environment.seconds")
        if self.environment and ENVIRONMENT in self.rewards:
            raise ValueError(f"rewards: the environment's own is called {ENVIRONMENT}: choose another name")
        if self.environment and self.vllm and self.vllm.asynchronous:
            raise ValueError("vllm.asynchronous: an episode is written turn by turn: take it or the environment out")
        return self


class GroupOptions(RewardedOptions):
    """What objectives have that compare a completion with its group."""

    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the model before training; 0 needs no second model in memory."""
    loss: Literal["grpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """How a step's tokens are weighed."""
    importance: Literal["token", "sequence"] = "token"
    """Whether probability ratios are a token's or the whole completion's (GSPO)."""

    @field_validator("loss", mode="before")
    @classmethod
    def _over_a_step(cls, name: Any) -> Any:
        if name == "bnpo":  # by TRL of what is computed at once, which is for speed alone to decide
            raise ValueError("loss bnpo divides by a batch's tokens; over a whole step that is dapo: set loss: dapo")
        return name

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in UNREAD.get(self.loss, ()):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} does nothing for loss {self.loss}: take it out")
        if self.loss == "luspo" and self.importance != "sequence":
            raise ValueError("loss luspo works on whole completions: set importance: sequence")
        if self.loss == "cispo" and (self.epsilon_high is None or self.epsilon_high <= 1):
            # TRL takes it for the bound itself, where others add it to 1: at 0.2 every ratio would be cut to that.
            raise ValueError("loss cispo bounds the ratio itself by epsilon_high: set it above 1, e.g. 5")
        return self


class GrpoOptions(GroupOptions):
    """Settings of group relative policy optimization."""

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of their group, of the batch, or nothing."""


BALANCE = {"router_aux_loss_coef": 0.0}
"""TRL's arguments for a mixture of experts: its balance is no part of these losses, and would be that of whatever is
computed at once."""


def sampling_settings(options: SampledOptions) -> dict[str, Any]:
    """TRL's arguments that all online trainers share."""
    return {
        "max_completion_length": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }


def reward_settings(options: RewardedOptions) -> dict[str, Any]:
    """TRL's arguments that trainers with rewards share."""
    return {
        **sampling_settings(options),
        **BALANCE,
        "num_generations": options.group_size,
        "num_iterations": options.iterations,
        "epsilon": options.epsilon,
        "epsilon_high": options.epsilon_high,
        "mask_truncated_completions": options.mask_truncated,
        "reward_weights": [choice.weight for choice in options.rewards.values()],
    }


def group_settings(options: GroupOptions) -> dict[str, Any]:
    """TRL's arguments that GRPO and its kin share."""
    return {
        **reward_settings(options),
        "beta": options.beta,
        "loss_type": options.loss,
        "importance_sampling_level": options.importance,
        "max_tool_calling_iterations": options.environment.turns if options.environment else None,
    }


def settings(options: GrpoOptions) -> Mapping[str, Any]:
    """TRL's arguments."""
    return {**group_settings(options), "scale_rewards": options.scale_rewards}


OBJECTIVE = Objective(version=5, options=GrpoOptions, kinds=("prompt",), online=Online("GRPOTrainer", settings))
