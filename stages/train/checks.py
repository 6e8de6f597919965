"""Settings of the train section that do not fit together, found before anything runs."""

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stages import objectives
from stages.errors import UserError
from stages.objectives.grpo import GroupOptions
from stages.runtime import Runtime
from stages.train import optimizers

if TYPE_CHECKING:
    from stages.train import Lora, TrainConfig


ELEMENTWISE = ("adamw_torch_fused", "adamw_16bit", "adamw_torch")
"""Optimizers that may hold any part of a weight, whatever its shape."""
FROM_WEIGHTS = ("olora", "pissa", "pissa_niter_16", "loftq")
"""Adapters that start as a part of the weights."""


def misfits(config: "TrainConfig") -> Iterator[str]:
    """What is wrong with a section, each with its mend."""
    yield from _of_objective(config)
    yield from _of_method(config)
    if config.method == "lora":
        yield from _of_lora(config)
    yield from _of_optimizer(config)
    yield from _of_steps(config)


def _of_objective(config: "TrainConfig") -> Iterator[str]:
    objective = objectives.find(config.objective)
    if objective.head and "lm_head" in config.lora.modules_to_save:
        yield f"`lora.modules_to_save: lm_head`: {config.objective} puts another head in its place; take it out"
    if objective.reference and config.method == "lora" and config.lora.init == "loftq":
        yield (
            f"`lora.init: loftq`: {config.objective} compares with the quantized model, and training would start from "
            "another, which the adapter has brought nearer to the whole one: choose another init"
        )
    if objective.online is None:
        return
    unread = {
        "quantize": config.quantize is not None,
        "neftune_alpha": config.neftune_alpha is not None,
        "ema": config.ema is not None,
        "evaluate_every": config.evaluate_every is not None,
        f"on_spike: {config.on_spike}": config.on_spike != "note",
        "precision: fp8": config.precision == "fp8",
        "full": config.full != type(config.full)(),
        "lora.dropout": config.lora.dropout > 0,
        "lora.restart_every": config.lora.restart_every is not None,
        f"lora.init: {config.lora.init}": config.lora.init in ("eva", "loftq"),
    }
    for name, is_set in unread.items():
        if is_set:
            yield f"`{name}`: {config.objective} trains on what the model itself writes, without it; take it out"
    if config.method == "lora" and config.lora.init in FROM_WEIGHTS:
        options = objectives.options_of(config.objective, config.objective_options)
        beta = options.beta if isinstance(options, GroupOptions) else 0
        # Under such an adapter is another model: a part of its weights went into the adapter. For a reference TRL makes
        # a second adapter, which takes another part; its RLOOTrainer does so even where nothing is compared.
        if objective.online.trainer == "RLOOTrainer" or beta:
            yield (
                f"`lora.init: {config.lora.init}`: {config.objective} looks for the model before training under the "
                f"adapter: choose another init{', or `beta: 0`' if beta else ''}"
            )
    if config.method == "lora" and config.objective_options.get("vllm"):
        for name in ("experts", "new_tokens"):
            if getattr(config.lora, name):
                yield f"`lora.{name}`: vLLM cannot be told such weights: take it or `objective_options.vllm` out"


def _of_method(config: "TrainConfig") -> Iterator[str]:
    if config.method == "lora" and config.full != type(config.full)():
        yield "`full` is set, but the method is lora: set `method: full`, or take the section out"
    if config.method == "full":
        if config.quantize:
            yield "quantized weights cannot be trained themselves: set `method: lora`, or take `quantize` out"
        if names := _changed(config.lora):
            said = ", ".join(f"`lora.{name}`" for name in names)
            are, them = ("is", "it") if len(names) == 1 else ("are", "them")
            yield f"{said} {are} set, but the method is full: set `method: lora`, or take {them} out"
    full = config.full
    if full.spectrum is not None and full.only:
        yield "`full.spectrum` and `full.only` both choose the weights that train: keep one, or use `full.freeze`"
    if full.lisa is not None and (full.only or full.freeze or full.spectrum is not None):
        yield "`full.lisa` chooses the layers that train: take `only`, `freeze` and `spectrum` out"
    if full.lisa is not None and config.ema is not None:
        yield "`ema` would average layers that rest with layers that train: take it or `full.lisa` out"
    if full.lisa is not None and config.optimizer.startswith("schedule_free"):
        yield "`full.lisa` would lose a schedule-free optimizer's average of a layer that rests: choose another one"
    if config.optimizer == "stable_adamw":
        for name, starts_anew in (("full.lisa", full.lisa), ("lora.restart_every", config.lora.restart_every)):
            if starts_anew is not None:
                yield (
                    f"`{name}` and `optimizer: stable_adamw`, which counts the steps of all weights together, so that "
                    "those that start anew would move too little: choose another one"
                )


def _changed(section: "Lora") -> list[str]:
    """The fields of a section that do not have their default."""
    plain = type(section)()
    return [name for name in type(section).model_fields if getattr(section, name) != getattr(plain, name)]


def _of_lora(config: "TrainConfig") -> Iterator[str]:
    lora = config.lora
    if lora.experts:
        for name in ("dropout", "dora", "restart_every"):
            if getattr(lora, name):
                yield f"`lora.{name}` does not work on fused experts: take it out, or set `lora.experts: false`"
        if lora.init not in ("kaiming", "gaussian"):
            yield f"`lora.init: {lora.init}` does not work on fused experts: leave it out, or set `lora.experts: false`"
    if lora.dora and (lora.init in FROM_WEIGHTS or lora.init == "eva"):
        yield f"`lora.dora` does not work with `lora.init: {lora.init}`: take one out"
    if lora.restart_every is None and "restart_warmup" in _changed(lora):
        yield "`lora.restart_warmup` is set, but nothing restarts: set `lora.restart_every`, or take it out"
    if lora.restart_every is not None:
        if lora.dora:
            yield "`lora.restart_every` does not work with `lora.dora`: a magnitude cannot be added to weights"
        if lora.init not in ("kaiming", "gaussian"):
            yield (
                f"`lora.restart_every` starts anew at random with B at zero, which `lora.init: {lora.init}` does not: "
                "take one out"
            )
        if config.quantize:
            yield "`lora.restart_every` adds to the weights, and `quantize` would round that away: take one out"
        if config.ema is not None:
            yield "`ema` averages across restarts what is not the same adapter: take it or `lora.restart_every` out"
        if config.keep == "best":
            yield "`keep: best` does not work with `lora.restart_every`: the weights under the adapter have moved on"
        if config.optimizer.startswith("schedule_free"):
            yield "`lora.restart_every` cannot reset the averages of a schedule-free optimizer: choose another one"
    if lora.init == "loftq" and config.quantize != "nf4":
        yield "`lora.init: loftq` makes up for quantization: set `quantize: nf4`, or choose another init"
    if config.quantize and lora.init in ("pissa", "pissa_niter_16", "olora", "eva", "orthogonal"):
        yield f"`lora.init: {lora.init}` needs weights in full precision: take `quantize` out, or use `init: loftq`"
    whole = lora.new_tokens or lora.modules_to_save or objectives.find(config.objective).head
    if config.embedding_learning_rate is not None and not whole:
        yield (
            "`embedding_learning_rate`: no embedding trains: name them in `lora.modules_to_save` or `lora.new_tokens`, "
            "or take it out"
        )
    if lora.new_tokens and {"embed_tokens", "lm_head"} & set(lora.modules_to_save):
        yield "`lora.new_tokens` trains some rows of the embeddings, `lora.modules_to_save` all: keep one of the two"


def _of_optimizer(config: "TrainConfig") -> Iterator[str]:
    kind = optimizers.find(config.optimizer)
    for name, value in config.optimizer_options.items():
        if name in kind.options:
            if expected := _expected(name, value, kind.options[name]):
                yield f"`optimizer_options.{name}` is {value!r}: {config.optimizer} takes {expected}"
        else:
            near = difflib.get_close_matches(name, kind.options, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(kind.options) or 'none'}"
            yield f"`optimizer_options.{name}`: {config.optimizer} has no such option; {hint}"
    if config.precision == "fp8" and not optimizers.can_split(config):
        known = "adamw_torch_fused or adamw_16bit"
        other = (
            f"{known}, or `method: full`" if config.method == "lora" else "an optimizer that counts each weight's steps"
        )
        yield f"`precision: fp8` needs {other}, and neither lisa nor restarts"
    if config.precision == "fp8" and config.quantize:
        yield "`precision: fp8` is for weights of 16 bits: take it or `quantize` out"
    if not kind.betas and config.betas is not None:
        yield f"`betas`: {config.optimizer} has none; take them out"
    if kind.low_rank and config.method == "lora":
        yield f"`optimizer: {config.optimizer}` saves memory where all weights train; an adapter is small already"
    if config.optimizer.startswith("schedule_free") and config.schedule != "constant":
        yield f"`optimizer: {config.optimizer}` needs no schedule: set `schedule: constant`"
    if config.optimizer.startswith("schedule_free") and config.ema is not None:
        yield f"`ema`: {config.optimizer} averages the weights by itself; take it out"


def _expected(name: str, value: optimizers.Value, plain: optimizers.Value) -> str:
    """What an option takes, if a value is not that; `plain` is the value it has otherwise."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match plain:
        case bool():
            return "" if isinstance(value, bool) else "true or false"
        case int():
            return "" if isinstance(value, int) and number and value >= 1 else "a whole number, at least 1"
        case float():
            small = 0 < abs(plain) < 1e-3  # YAML reads 1e-08 as a word
            return "" if number else f"a number, such as {plain:{'.1e' if small else 'g'}}"
    words = optimizers.WORDS[name]
    return "" if value in words else f"one of {', '.join(words)}"


def _of_steps(config: "TrainConfig") -> Iterator[str]:
    for name in ("warmup", "decay", "evaluate_every"):
        value = getattr(config, name)
        if value is not None and value > 1 and value != int(value):
            yield f"`{name}` is {value:g}: a whole number of steps, or a share below 1"
    if config.decay != type(config).model_fields["decay"].default and config.schedule != "wsd":
        yield f"`decay` is for the schedule wsd, not {config.schedule}: set `schedule: wsd`, or take it out"
    if config.floor and config.schedule in ("constant", "inverse_sqrt"):
        yield f"`floor` is for schedules that fall to an end: cosine, linear or wsd, not {config.schedule}"
    if config.evaluate_every is None:
        for name, wanted in (("patience", config.patience is not None), ("keep: best", config.keep == "best")):
            if wanted:
                yield f"`{name}` needs `evaluate_every`: how often to look at the held-out loss"


def refuse_sharded(config: "TrainConfig", shard: str) -> None:
    """Raise UserError for what cannot be trained where each rank holds a part of the model."""
    asked = {
        "quantize": config.quantize is not None,
        "ema": config.ema is not None,
        "keep: best": config.keep == "best",
        "full.lisa": config.full.lisa is not None,
        "lora.restart_every": config.lora.restart_every is not None,
        "precision: fp8": config.precision == "fp8",
        f"objective: {config.objective}": objectives.find(config.objective).baseline is not None,
        f"optimizer: {config.optimizer}": config.optimizer not in ELEMENTWISE,
    }
    if found := [f"train.{name}" for name, is_asked in asked.items() if is_asked]:
        raise UserError(
            f"{', '.join(found)} and sharded ranks do not go together yet: set the runtime's shard to none, or take "
            "it out of the recipe"
        )
    if not shard.startswith("zero"):
        return
    if config.precision == "fp16":
        raise UserError(
            f"train.precision fp16 and the runtime's shard {shard} do not go together: set the precision to bf16, or "
            "shard to fsdp"
        )
    if config.evaluate_every is not None:
        raise UserError(
            f"train.evaluate_every and the runtime's shard {shard} do not go together yet: set shard to fsdp, or take "
            "it out of the recipe"
        )


def refuse_ranks(config: "TrainConfig", runtime: Runtime) -> None:
    """Raise UserError for a runtime that wants several ranks of an objective that trains on one device alone."""
    for name, found, mend in (("ranks", runtime.ranks, "auto"), ("shard", runtime.shard, "none")):
        if found not in ("auto", 1, "none"):
            raise UserError(
                f"the runtime asks for `{name}: {found}`, and train.objective {config.objective} trains on one device "
                f"alone: set {name} to {mend}"
            )


def refuse_device(config: "TrainConfig", device: str) -> None:
    """Raise UserError where a device cannot do the precision or the optimizer, or the optimizer is not installed or
    refuses its options."""
    import torch

    optimizers.require(config.optimizer)
    if config.precision == "fp16" and device == "cpu":
        raise UserError("train.precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if config.precision == "fp8" and (device == "cpu" or torch.cuda.get_device_capability() < (8, 9)):
        raise UserError("train.precision fp8 needs a GPU of the generation Ada, Hopper or later: use bf16 here")
    if config.precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU has no bf16: set train.precision to fp16 or fp32")
    if device == "cpu" and config.quantize == "int8" and config.lora.dora:
        # PEFT asks for the whole weight in every step, and on a CPU bitsandbytes loses its scales over that.
        raise UserError("train.lora.dora does not work over int8 weights on a CPU: use quantize: nf4, or a GPU")
    if device == "cpu" and (why := optimizers.find(config.optimizer).gpu):
        plain = config.optimizer.removeprefix("paged_").replace("adamw_32bit", "adamw_torch_fused")
        plain = plain.replace("galore_adamw_8bit", "galore_adamw")
        raise UserError(f"train.optimizer {config.optimizer} {why}; on a CPU use {plain}")
    optimizers.try_options(config)
