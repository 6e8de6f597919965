"""train: weights fitted to the packed batches of a plan, as a LoRA adapter or in full.

Reads the model, the tokens and the plan; writes `adapter/` (PEFT) or `weights/` (a Hugging Face folder without
tokenizer), `metrics.jsonl` (a line a step) and `train.json`. Killed at any moment, it continues from its newest
checkpoint and computes the losses it would have computed.

This file holds the recipe section and declares the stage; the work is in the files beside it:

    data.py          optimizer steps as lists of micro-batches
    model.py         loading, adapters, and what is written at the end
    trainer.py       transformers' Trainer over those steps
    checkpoints.py   complete or invisible
    run.py           the stage function: all of it in order
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from stages import objectives
from stages.stage import Facts, Stage, StageConfig, Work


class Lora(StageConfig):
    """A low-rank adapter (arXiv:2106.09685): each target W becomes W + alpha / rank * B A."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rows of A and columns of B."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapter: its product is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's input that is zeroed while training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers to adapt: every linear layer but the head, or names such as `[q_proj, v_proj]`."""

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError("name at least one layer, or leave it out for all-linear")
        return targets if isinstance(targets, str) else tuple(sorted(set(targets)))


class TrainConfig(StageConfig):
    """What is minimised, over which weights, and how."""

    objective: str = "sft"
    """A file in `stages/objectives/`."""
    method: Literal["lora", "full"] = "lora"
    """Train an adapter beside frozen weights, or all weights."""
    lora: Lora = Lora()
    """The adapter, for the method lora."""
    epochs: float = Field(default=1.0, gt=0, le=1000)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of `epochs`."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """At its highest, after the warmup."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup: to zero along half a cosine, to zero in a line, not at all."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises in a line from zero."""
    optimizer: Literal["adamw_torch_fused", "adamw_torch", "adafactor"] = "adamw_torch_fused"
    """By transformers' name."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the averages of the gradient and of its square."""
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    """AdamW's decoupled weight decay, on matrices only (not on biases and norms)."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    """A step's gradient is scaled down to this Euclidean norm when it is longer."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the forward and backward pass; trained weights and optimizer are float32 in both."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the adapter's start, dropout, and the order of steps after the first epoch."""

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, name: str) -> str:
        objectives.find(name)
        return name


def run(config: TrainConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Train. See `stages.train.run` for inputs, files and errors."""
    from stages.train.run import train

    return train(config, inputs, output, work)


def _plugins(config: TrainConfig) -> Mapping[str, int]:
    return {f"objective:{config.objective}": objectives.find(config.objective).version}


STAGE = Stage(name="train", artifact="adapter", version=3, config=TrainConfig, run=run, plugins=_plugins)
