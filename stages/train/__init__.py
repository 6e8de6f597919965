"""train: weights fitted to the packed batches of a plan, as a LoRA adapter or in full.

Reads the model, the tokens and the plan; writes `adapter/` (PEFT) or `weights/` (a Hugging Face folder without
tokenizer), `metrics.jsonl` (a line a step) and `train.json`. Killed at any moment, it continues from its newest
checkpoint and computes the losses it would have computed.

This file holds the recipe section and declares the stage; the work is in the files beside it:

    checks.py        settings that do not fit together
    data.py          optimizer steps as lists of micro-batches; samples.py: single batches, to try the model on
    windows.py       the shards that steps read, on the disk
    model.py         the model that is trained, and what is written at the end
    freezing.py      which weights train, for the method full; patterns.py: their names, which named.py looks for early
    adapters.py      LoRA and its kin; folding.py, eva.py: adapters that start from the weights, or from activations
    neftune.py       noise on the embeddings
    optimizers.py    optimizers by name; schedules.py: the learning rate
    between.py       what happens between steps: restarts, layer sampling; weights.py: averages; heldout.py: its loss
    trainer.py       transformers' Trainer over those steps; training.py: one attempt's circumstances
    progress.py      figures told while it runs
    saving.py        when it saves, and when it stops
    state.py         what a checkpoint holds
    checkpoints.py   complete or invisible
    adamw.py         AdamW over weights of 16 + 16 bits; over_split.py: every other optimizer over
                     them; together.py: several as one
    lora_linear.py   a layer with its adapter as one operation; lora_mlp.py, lora_attention.py: layers that go
                     together, whose weights lora_stack.py lays together
    lora_experts.py  adapters of a mixture's experts
    float8.py        products in 8 bits
    speed.py         chooses among these, and compiles
    recomputing.py   activation checkpointing
    memory.py        the memory plan; planning.py: for one attempt
    metrics.py       a step's figures; trackers.py: where else they go
    policy.py        what happens when the loss jumps
    ranks.py         several processes, one training; sharding.py cuts the model over them, or zero.py
                     does through DeepSpeed
    proofs.py        what must hold of the model before it trains
    run.py           one attempt: all of it in order; results.py: what it leaves
    supervise.py     the stage function: attempts, until one comes to its end
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stages import environments, objectives, rewards
from stages.stage import Facts, Stage, StageConfig, Work
from stages.train import checks, optimizers, patterns

Name = Annotated[str, Field(min_length=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]

FP8 = 2
"""The version of how training in 8 bits is done: which layers do, and how they round."""


class Lora(StageConfig):
    """A low-rank adapter (arXiv:2106.09685): each target W becomes W + alpha / rank * B A."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rows of A and columns of B."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapter: its product is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's input that is zeroed while training."""
    targets: Literal["all-linear"] | tuple[Name, ...] = "all-linear"
    """Layers to adapt: every linear layer but the head, or names, globs or `re:` patterns: `[q_proj, "*.mlp.*"]`."""
    experts: bool = False
    """Adapt the fused experts of a mixture-of-experts model too."""
    modules_to_save: tuple[Name, ...] = ()
    """Modules that train in full beside the adapter, such as `[embed_tokens, lm_head]`."""
    new_tokens: tuple[Name, ...] = ()
    """Tokens, by their text, whose embeddings train beside the adapter, and no other token's."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which keeps high ranks learning (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Learn each output's magnitude apart from its direction (DoRA, arXiv:2402.09353)."""
    init: Literal["kaiming", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_16", "loftq", "eva"] = "kaiming"
    """How A and B start, by PEFT's names: random and zero, or from the weights (olora, pissa), from what quantization
    lost (loftq), or from the first steps' activations (eva)."""
    plus_ratio: float | None = Field(default=None, ge=1)
    """B's learning rate over A's, about 16 (LoRA+, arXiv:2402.12354); equal when left out."""
    restart_every: int | None = Field(default=None, ge=1)
    """Steps after which the adapter is added to the weights and starts anew (ReLoRA, arXiv:2307.05695)."""
    restart_warmup: int = Field(default=10, ge=0)
    """Steps in which the learning rate comes back after a restart."""

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError("name at least one layer, or leave it out for all-linear")
        if isinstance(targets, str):
            return targets
        patterns.refuse_broken(targets)
        return tuple(sorted(set(targets)))

    @field_validator("modules_to_save", "new_tokens")
    @classmethod
    def _sorted(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(names)))


class Lisa(StageConfig):
    """Only a few random layers train at a time, with the embeddings and the head (arXiv:2403.17919)."""

    layers: int = Field(default=2, ge=1)
    """Layers that train at a time."""
    every: int = Field(default=20, ge=1)
    """Steps after which others are drawn."""


class Full(StageConfig):
    """Which weights train, for the method full: all of them, unless narrowed."""

    only: tuple[Name, ...] = ()
    """Weights that train, by name, glob or `re:` pattern: `[mlp, "re:.*layers\\.2[0-9]\\..*"]`."""
    freeze: tuple[Name, ...] = ()
    """Weights that do not train, as patterns; stronger than `only` and `spectrum`."""
    spectrum: float | None = Field(default=None, gt=0, lt=1)
    """Share of the matrices of each kind that train: those with most signal over noise (arXiv:2406.06623)."""
    lisa: Lisa | None = None
    """A few random layers at a time."""

    @field_validator("only", "freeze")
    @classmethod
    def _sorted(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        patterns.refuse_broken(names)
        return tuple(sorted(set(names)))


class TrainConfig(StageConfig):
    """What is minimised, over which weights, and how."""

    objective: str = "sft"
    """A file in `stages/objectives/`."""
    objective_options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """The objective's own settings, such as `{beta: 0.1}` for dpo."""
    method: Literal["lora", "full"] = "lora"
    """Train an adapter beside frozen weights, or the weights themselves."""
    lora: Lora = Lora()
    """The adapter, for the method lora."""
    full: Full = Full()
    """Which weights, for the method full."""
    quantize: Literal["nf4", "int8"] | None = None
    """Hold the frozen weights under an adapter in 4 or 8 bits (QLoRA, arXiv:2305.14314). Needs bitsandbytes."""
    epochs: float = Field(default=1.0, gt=0, le=1000)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of `epochs`."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """At its highest, after the warmup."""
    embedding_learning_rate: float | None = Field(default=None, gt=0, le=1)
    """The highest for embeddings and head, where they train; `learning_rate` when left out."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after the warmup: along half a cosine, in a line, not at all, in a line at the very
    end (warmup, stable, decay), or as one over the square root of the steps."""
    floor: float = Field(default=0.0, ge=0, lt=1)
    """Share of the learning rate at which cosine, linear and wsd end."""
    warmup: float = Field(default=0.03, ge=0)
    """Steps in which the learning rate rises in a line from zero; below 1, a share of all steps."""
    decay: float = Field(default=0.2, gt=0)
    """Steps at the end in which wsd falls; up to 1, a share of all steps."""
    optimizer: str = "adamw_torch_fused"
    """By transformers' name, or muon: a line of docs/training-methods.md."""
    optimizer_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """The optimizer's own settings, such as `{rank: 64}` for galore_adamw."""
    betas: tuple[Beta, Beta] | None = None
    """Decay rates of the averages of the gradient and of its square; the optimizer's own when left out, for AdamW
    [0.9, 0.999]."""
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decoupled weight decay, on matrices only (not on biases and norms)."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    """A step's gradient is scaled down to this Euclidean norm when it is longer; 1.0e+9 turns that off."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Uniform noise on the embeddings while training, about 5 (NEFTune, arXiv:2310.05914)."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Write an average of the weights over the steps instead of the last ones, with this decay a step."""
    evaluate_every: float | None = Field(default=None, gt=0)
    """Steps between looks at the loss of the held-out rows; below 1, a share of all steps."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many looks in a row without a better held-out loss."""
    keep: Literal["last", "best"] = "last"
    """Write the weights of the last step, or those with the best held-out loss."""
    on_spike: Literal["note", "stop", "rollback"] = "note"
    """When a step's loss or gradient norm lies six standard deviations above the 128 steps before: note its rows in the
    record, stop, or go back to the last checkpoint and train on without it. What is no number is never only noted."""
    precision: Literal["bf16", "fp8", "fp16", "fp32"] = "bf16"
    """Arithmetic of the forward and backward pass; trained weights and optimizer are float32 in all of them. fp8 is
    bf16 but for the products of linear layers, on GPUs that have it."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the adapter's start, dropout, noise, and the order of steps after the first epoch."""

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, name: str) -> str:
        objectives.find(name)
        return name

    @field_validator("objective_options")
    @classmethod
    def _known_options(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "objective" not in info.data:  # told already
            return given
        return objectives.options_of(info.data["objective"], given).model_dump(mode="json")

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        optimizers.find(name)
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        if wrong := list(checks.misfits(self)):
            raise ValueError("; ".join(wrong))
        return self

    @property
    def reward_models(self) -> dict[tuple[str, ...], str]:
        """The models of `fetch.reward_models` that its rewards ask, by the place in this section that names them."""
        asked: dict[tuple[str, ...], str] = {}
        for name, given in self.objective_options.get("rewards", {}).items():
            if model := rewards.model_of(rewards.RewardChoice.model_validate(given)):
                asked["objective_options", "rewards", name, "options", "model"] = model
        return asked

    @property
    def steps(self) -> dict[tuple[str, ...], str]:
        """The same of those rewards that say how steps combine, by the place that says it."""
        options = {place: self.objective_options["rewards"][place[2]]["options"] for place in self.reward_models}
        return {(*place[:-1], "steps"): told["model"] for place, told in options.items() if told.get("steps")}

    @property
    def own_code(self) -> list[str]:
        """Where this section names Python files of the user's own."""
        options = self.objective_options
        rewarded = [f"rewards.{name}" for name, choice in options.get("rewards", {}).items() if choice.get("code")]
        acted = ["environment"] if (options.get("environment") or {}).get("code") else []
        return [f"train.objective_options.{place}" for place in (*rewarded, *acted)]


def run(config: TrainConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Train. See `stages.train.run.attempt` for inputs, files and errors."""
    if objectives.find(config.objective).online:
        from stages.train import online

        return online.train(config, inputs, output, work)
    from stages.train.supervise import train

    return train(config, inputs, output, work)


def _plugins(config: TrainConfig) -> Mapping[str, int]:
    chosen = config.objective_options.get("rewards", {}).values()
    named = {choice["reward"] for choice in chosen} & set(rewards.names())
    acted = {(config.objective_options.get("environment") or {}).get("name", "")} & set(environments.names())
    return {
        f"objective:{config.objective}": objectives.find(config.objective).version,
        **{f"reward:{name}": rewards.find(name).version for name in sorted(named)},
        **{f"environment:{name}": environments.find(name).version for name in sorted(acted)},
        **({"precision:fp8": FP8} if config.precision == "fp8" else {}),
    }


STAGE = Stage(
    name="train",
    artifact="adapter",
    version=16,
    config=TrainConfig,
    run=run,
    streamed=frozenset({"tokens"}),
    plugins=_plugins,
)
