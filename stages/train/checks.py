"""Settings of the train section that do not fit together, found before anything runs."""

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stages.errors import UserError
from stages.train import optimizers

if TYPE_CHECKING:
    from stages.train import TrainConfig


def misfits(config: "TrainConfig") -> Iterator[str]:
    """What is wrong with a section, each with its mend."""
    yield from _of_optimizer(config)
    yield from _of_steps(config)


def _of_optimizer(config: "TrainConfig") -> Iterator[str]:
    kind = optimizers.find(config.optimizer)
    for name in config.optimizer_options:
        if name not in kind.options:
            near = difflib.get_close_matches(name, kind.options, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(kind.options) or 'none'}"
            yield f"`optimizer_options.{name}`: {config.optimizer} has no such option; {hint}"
    if not kind.betas and config.betas is not None:
        yield f"`betas`: {config.optimizer} has none; take them out"
    if kind.low_rank and config.method == "lora":
        yield f"`optimizer: {config.optimizer}` saves memory where all weights train; an adapter is small already"
    if config.optimizer.startswith("schedule_free") and config.schedule != "constant":
        yield f"`optimizer: {config.optimizer}` needs no schedule: set `schedule: constant`"


def _of_steps(config: "TrainConfig") -> Iterator[str]:
    for name in ("warmup", "decay"):
        value = getattr(config, name)
        if value > 1 and value != int(value):
            yield f"`{name}` is {value:g}: a whole number of steps, or a share below 1"
    if config.floor and config.schedule in ("constant", "inverse_sqrt"):
        yield f"`floor` is for schedules that fall to an end: cosine, linear or wsd, not {config.schedule}"


def refuse_device(config: "TrainConfig", device: str) -> None:
    """Raise UserError where a device cannot do the precision or the optimizer, or the optimizer is not installed."""
    import torch

    optimizers.require(config.optimizer)
    if config.precision == "fp16" and device == "cpu":
        raise UserError("train.precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if config.precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU has no bf16: set train.precision to fp16 or fp32")
    if device == "cpu" and (why := optimizers.find(config.optimizer).gpu):
        plain = config.optimizer.removeprefix("paged_").replace("adamw_32bit", "adamw_torch_fused")
        plain = plain.replace("galore_adamw_8bit", "galore_adamw")
        raise UserError(f"train.optimizer {config.optimizer} {why}; on a CPU use {plain}")
