"""Optimizers by name: transformers' names where it has one, and what it takes to make them.

Weights fall into groups by learning rate and decay: matrices decay, biases and norms do not; embeddings and head may
have a learning rate of their own, and LoRA's B another than its A (LoRA+).
"""

import difflib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stages.errors import UserError

if TYPE_CHECKING:
    import torch

    from stages.train import TrainConfig

Value = bool | int | float | str


@dataclass(frozen=True)
class Kind:
    """How an optimizer is made."""

    where: str
    """`module:Class`."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What makes this name of the class."""
    options: Mapping[str, Value] = field(default_factory=dict)
    """What `train.optimizer_options` may set, with the values it has otherwise. A whole number is at least 1."""
    extra: str = ""
    """The extra of regrow that installs it, where that is not `train`."""
    betas: bool = True
    """Whether it takes the recipe's `betas`."""
    matrices: bool = False
    """Whether it takes only two-dimensional weights of layers; the others go to AdamW, with the recipe's `betas`."""
    gpu: str = ""
    """Why it needs a GPU, where it does."""
    low_rank: bool = False
    """Whether its options are those of the matrices' parameter group."""
    counts_for_all: bool = False
    """Whether it counts its steps for all weights at once, so that these cannot be updated, or forgotten, apart."""
    coupled: bool = False
    """Whether its own weight decay goes through its averages: the weights then decay before its step."""


EPS: Mapping[str, Value] = {"eps": 1e-8}
GALORE: Mapping[str, Value] = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
APOLLO: Mapping[str, Value] = {
    "rank": 256,
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj": "random",
    "scale_type": "channel",
    "proj_type": "std",
}
WORDS: Mapping[str, tuple[str, ...]] = {
    "proj": ("random", "svd"),
    "proj_type": ("std", "reverse_std", "left", "right", "full"),
    "scale_type": ("channel", "tensor"),
}
"""The values of options that are words."""
FREE: Mapping[str, Value] = {"r": 0.0, "weight_lr_power": 2.0}
ADEMAMIX: Mapping[str, Value] = {"beta3": 0.9999, "alpha": 5.0, "eps": 1e-8}
EXTRA = "optimizers"
DECAY = "decoupled_weight_decay"
"""The weight decay of a parameter group whose optimizer is told of none."""
PAGED = "pages its state between GPU and CPU"


def _bnb(name: str, bits: int, options: Mapping[str, Value], gpu: str = "", **fixed: Any) -> Kind:
    given = {"optim_bits": bits, **fixed}
    return Kind(f"bitsandbytes.optim:{name}", given, options, "quantized", gpu=gpu)


def _rmsprop(bits: int) -> Kind:
    options = {"alpha": 0.99, "momentum": 0.0, **EPS}
    return replace(_bnb("RMSprop", bits, options), betas=False, coupled=True)


OPTIMIZERS: Mapping[str, Kind] = {
    "adamw_torch_fused": Kind("torch.optim:AdamW", {"fused": True}, EPS),
    "adamw_torch": Kind("torch.optim:AdamW", {}, EPS),
    "adamw_16bit": Kind("stages.train.adamw:SplitAdamW", {"moments": "bfloat16"}, EPS),
    "sgd": Kind("torch.optim:SGD", {}, {"momentum": 0.0, "nesterov": False}, betas=False, coupled=True),
    "adagrad": Kind("torch.optim:Adagrad", {}, {"lr_decay": 0.0, "eps": 1e-10}, betas=False, coupled=True),
    "rmsprop": Kind(
        "torch.optim:RMSprop",
        {},
        {"alpha": 0.99, "momentum": 0.0, "centered": False, **EPS},
        betas=False,
        coupled=True,
    ),
    "muon": Kind(
        "torch.optim:Muon",
        {"adjust_lr_fn": "match_rms_adamw"},
        {"momentum": 0.95, "nesterov": True, "ns_steps": 5},
        matrices=True,
    ),
    "adafactor": Kind(
        "transformers.optimization:Adafactor",
        {"scale_parameter": False, "relative_step": False},
        {"clip_threshold": 1.0, "decay_rate": -0.8},
        betas=False,
    ),
    "adamw_8bit": _bnb("AdamW", 8, EPS),
    "paged_adamw_8bit": _bnb("AdamW", 8, EPS, PAGED, is_paged=True),
    "paged_adamw_32bit": _bnb("AdamW", 32, EPS, PAGED, is_paged=True),
    "lion_8bit": _bnb("Lion", 8, {}),
    "lion_32bit": _bnb("Lion", 32, {}),
    "paged_lion_8bit": _bnb("Lion", 8, {}, PAGED, is_paged=True),
    "paged_lion_32bit": _bnb("Lion", 32, {}, PAGED, is_paged=True),
    "ademamix": _bnb("AdEMAMix", 32, ADEMAMIX),
    "ademamix_8bit": _bnb("AdEMAMix", 8, ADEMAMIX),
    "paged_ademamix_8bit": _bnb("AdEMAMix", 8, ADEMAMIX, PAGED, is_paged=True),
    "paged_ademamix_32bit": _bnb("AdEMAMix", 32, ADEMAMIX, PAGED, is_paged=True),
    "rmsprop_bnb_8bit": _rmsprop(8),
    "rmsprop_bnb_32bit": _rmsprop(32),
    "schedule_free_adamw": Kind("schedulefree:AdamWScheduleFree", {}, {**FREE, **EPS}, EXTRA, counts_for_all=True),
    "schedule_free_radam": Kind("schedulefree:RAdamScheduleFree", {}, {**FREE, **EPS}, EXTRA, counts_for_all=True),
    "schedule_free_sgd": Kind(
        "schedulefree:SGDScheduleFree", {}, {**FREE, "momentum": 0.9}, EXTRA, betas=False, counts_for_all=True
    ),
    "galore_adamw": Kind("galore_torch:GaLoreAdamW", {"no_deprecation_warning": True}, GALORE, EXTRA, low_rank=True),
    "galore_adamw_8bit": Kind(
        "galore_torch:GaLoreAdamW8bit", {}, GALORE, EXTRA, low_rank=True, gpu="has its arithmetic in CUDA alone"
    ),
    "galore_adafactor": Kind(
        "galore_torch:GaLoreAdafactor",
        {"scale_parameter": False, "relative_step": False},
        GALORE,
        EXTRA,
        betas=False,
        low_rank=True,
    ),
    "apollo_adamw": Kind("apollo_torch:APOLLOAdamW", {}, APOLLO, EXTRA, low_rank=True),
    "stable_adamw": Kind("optimi:StableAdamW", {}, {"eps": 1e-6}, EXTRA, counts_for_all=True),
}
"""transformers' names, and muon. Its layer-wise ones and (ada)lomo update within the backward pass, where neither
micro-batches can be added up nor gradients clipped; they are not offered."""


SPLIT = Kind("stages.train.adamw:SplitAdamW", {}, EPS)
"""What adamw_torch_fused is over weights of 16 + 16 bits."""


def can_split(config: "TrainConfig") -> bool:
    """Whether trained weights may be bfloat16 with their other 16 bits beside them (`stages.train.adamw`). What changes
    them, or which of them train, between steps wants them in one piece; adapters are small."""
    own = config.optimizer in ("adamw_torch_fused", "adamw_16bit")
    over = config.method == "full" and not find(config.optimizer).counts_for_all
    changed = config.full.lisa is not None or config.lora.restart_every is not None
    return config.precision in ("bf16", "fp8") and (own or over) and not changed


def find(name: str) -> Kind:
    """The optimizer of that name. Raises UserError with the nearest name."""
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(sorted(OPTIMIZERS))}"
        raise UserError(f"train.optimizer is {name!r}; {hint}")
    return OPTIMIZERS[name]


def require(name: str) -> None:
    """Raise UserError when what an optimizer comes in is not installed. Imports nothing heavy."""
    kind = find(name)
    if importlib.util.find_spec(kind.where.partition(":")[0].partition(".")[0]) is None:
        raise UserError(f"train.optimizer {name} is not installed: pip install 'regrow[{kind.extra or 'train'}]'")


def make(model: Any, config: "TrainConfig") -> "torch.optim.Optimizer":
    """The optimizer over a model's trainable weights, the recipe's learning rate in its first group."""
    kind, groups = find(config.optimizer), list(_groups(model, config))
    if kind.fixed.get("optim_bits") == 8:
        _keep_embeddings_wide(model)
    if kind.where == SPLIT.where or not any(hasattr(p, "low_bits") for p in model.parameters()):
        return _over(groups, kind, config)
    if config.optimizer == "adamw_torch_fused":
        return _over(groups, SPLIT, config)
    from stages.train.over_split import OverSplit

    return OverSplit(lambda: _over(groups, kind, config), [p for group in groups for p in group["params"]])


def try_options(config: "TrainConfig") -> None:
    """Raise UserError for `optimizer_options` that the optimizer itself refuses: it takes a step on two small matrices,
    before a model is loaded. One that needs a GPU, or has kernels of its own for one, is made only."""
    import torch

    if not config.optimizer_options:
        return
    kind = find(config.optimizer)
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((37, 23), (23, 37))]  # sizes that no rank has
    group = {"params": weights, "lr": config.learning_rate, "weight_decay": config.weight_decay, "matrix": True}
    try:
        optimizer = _over([group], kind, config)
        if not kind.gpu and kind.extra != "quantized":
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            with training(optimizer):
                optimizer.step()
    except UserError:
        raise
    except Exception as error:  # of any type: what a library meets that does not look at its arguments
        given = ", ".join(f"{name}: {json.dumps(value)}" for name, value in config.optimizer_options.items())
        raise UserError(
            f"train.optimizer_options {{{given}}} do not work with {config.optimizer}, which says: {error}"
        ) from error


def _over(groups: list[dict[str, Any]], kind: Kind, config: "TrainConfig") -> "torch.optim.Optimizer":
    """The optimizer over groups of parameters, each with `matrix`."""
    import torch

    made = _class(config.optimizer, kind)
    given: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, **kind.fixed}
    options = {**kind.options, **config.optimizer_options}
    if kind.betas and not kind.matrices and (betas := config.betas or _own_betas(made)):
        given["betas"] = (*betas[:2], options.pop("beta3")) if "beta3" in options else betas
    if kind.matrices:
        matrices, others = ([_plain(g) for g in groups if g["matrix"] == matrix] for matrix in (True, False))
        if not matrices:
            raise UserError(f"train.optimizer {config.optimizer} is for matrices of layers, and none trains")
        parts = [made(matrices, **given, **options)]
        if others:
            parts.append(torch.optim.AdamW(others, lr=config.learning_rate, betas=config.betas or (0.9, 0.999)))
        from stages.train.together import Together

        return Together(parts)
    if kind.low_rank:
        _let_load(made)
        plain = [{**_plain(group), **(options if group["matrix"] else {})} for group in groups]
    else:
        given |= options
        plain = [_plain(group) for group in groups]
    if kind.coupled:
        given["weight_decay"] = 0.0
        plain = [{**group, "weight_decay": 0.0, DECAY: group["weight_decay"]} for group in plain]
    optimizer: torch.optim.Optimizer = made(plain, **given)
    if kind.coupled:
        optimizer.register_step_pre_hook(_decay)
    return optimizer


def _decay(optimizer: Any, *_: Any) -> None:
    """Weight decay apart from the gradient (arXiv:1711.05101), of the weights that this step moves."""
    import torch

    with torch.no_grad():
        for group in optimizer.param_groups:
            if group[DECAY]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(1 - group["lr"] * group[DECAY])


def parts_of(optimizer: Any) -> list[Any]:
    """The optimizers that one is made of: itself, unless it is several `together`."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    parts: list[Any] = getattr(optimizer, "parts", [optimizer])
    return parts


def forget(optimizer: Any, parameters: "Iterable[torch.Tensor]") -> None:
    """Drop what an optimizer knows of some weights, as if they had not been trained."""
    parts = parts_of(optimizer)
    for parameter in parameters:
        for part in parts:
            known = part.state.pop(parameter, {})
            if "seed" in known:  # apollo_adamw draws a weight's projection from it, and gives it out once
                part.state[parameter] = {"seed": known["seed"]}


@contextmanager
def training(optimizer: Any) -> Iterator[None]:
    """Schedule-free optimizers hold other weights while they train than they are judged by. A block that trains."""
    _switch(optimizer, "train")
    try:
        yield
    finally:
        _switch(optimizer, "eval")


@contextmanager
def judging(optimizer: Any) -> Iterator[None]:
    """A block, within one that trains, in which the model holds the weights it is judged by."""
    _switch(optimizer, "eval")
    try:
        yield
    finally:
        _switch(optimizer, "train")


def _switch(optimizer: Any, mode: str) -> None:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if hasattr(optimizer, "train"):
        getattr(optimizer, mode)()


def _class(name: str, kind: Kind) -> Any:
    module, _, made = kind.where.partition(":")
    require(name)
    try:
        return getattr(importlib.import_module(module), made)
    except AttributeError as error:
        raise UserError(f"train.optimizer {name} needs a newer {module.partition('.')[0]}") from error


def _own_betas(made: Any) -> Any:
    return inspect.signature(made).parameters["betas"].default


def is_matrix(name: str, parameter: "torch.Tensor") -> bool:
    """Whether a weight is a matrix, or one for each expert. The biases of fused experts lie in rows, and are none."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def _groups(model: Any, config: "TrainConfig") -> Iterator[dict[str, Any]]:
    """Parameter groups of torch, each with `matrix`: whether it holds matrices of layers, not of embeddings or head."""
    embedded = {id(p) for p in embedding_parameters(model)}
    found: dict[tuple[bool, float, float, bool], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        embedding = id(parameter) in embedded
        rate = config.learning_rate
        if embedding and ".lora_" not in name and config.embedding_learning_rate is not None:
            rate = config.embedding_learning_rate
        elif config.lora.plus_ratio is not None and ".lora_B." in name:
            rate *= config.lora.plus_ratio
        matrix = is_matrix(name, parameter) and not getattr(parameter, "_no_weight_decay", False)
        decay = config.weight_decay if matrix else 0.0
        key = (rate != config.learning_rate, rate, -decay, matrix and parameter.ndim == 2 and not embedding)
        found.setdefault(key, []).append(parameter)
    for (_, rate, decay, matrix), parameters in sorted(found.items(), key=lambda item: item[0]):
        yield {"params": parameters, "lr": rate, "weight_decay": -decay, "matrix": matrix}


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "matrix"}


def embedding_parameters(model: Any) -> Iterable["torch.Tensor"]:
    """The weights of embeddings, of positions too, and of the head."""
    from torch import nn

    head = getattr(model, "score", None)  # a reward model's, in the place of the other
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in (*tables, model.get_input_embeddings(), model.get_output_embeddings(), head):
        if module is not None:
            yield from module.parameters()


def _keep_embeddings_wide(model: Any) -> None:
    """bitsandbytes' advice: 8-bit states do not hold the rare, large gradients of embeddings. It remembers them for as
    long as the process runs, so those of an earlier attempt are forgotten first."""
    import bitsandbytes
    from torch import nn

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def _let_load(made: Any) -> None:
    """Let torch read the projections of these optimizers back from a checkpoint, which it does for known types only."""
    import torch

    package = importlib.import_module(made.__module__)
    known: list[Any] = [
        each for name, each in vars(package).items() if name.endswith("Projector") and inspect.isclass(each)
    ]
    torch.serialization.add_safe_globals(known)
