"""LoRA and its kin on a loaded model, through PEFT: where the adapters go, how they start, what they are written as.

Adapters are held in float32 beside weights of the recipe's precision; autocast chooses the arithmetic.

In many mixtures, PEFT takes every `gate_proj`, `up_proj` and `down_proj` for those of the routed experts, as they were
called in transformers 4, and adapts the fused experts in place of the layer that was named: a shared expert's, a dense
layer's. It does so again when it loads an adapter. So it is kept from that here, and such layers are written as
`target_parameters`, which it takes as they are: the same tensors by the same names.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages import quantization
from stages.errors import UserError
from stages.train import Lora, adamw, checks, folding
from stages.train.patterns import matches, nearest, some

STARTS = {"kaiming": True, "loftq": True}
"""Our names for what PEFT calls otherwise; loftq starts like any other and is then replaced."""


def adapt(model: PreTrainedModel, lora: Lora, folder: Path) -> PeftModel:
    """The model with fresh float32 adapters, everything else frozen; the start is drawn from torch's seed.

    `folder` is where the model came from. Raises UserError when a target names no layer, a layer is narrower than the
    rank, what should train cannot, or PEFT refuses a layer or adapts another.
    """
    modules = {id(module): name for name, module in model.named_modules()}
    layers = _layers(model)
    targets, (saved, spelled) = chosen(model, lora)
    experts = _experts(model) if lora.experts else set()
    _refuse_untrainable(model, lora, saved, targets & _head(model, layers))
    if lora.init == "olora" and (turned := [name for name in targets if isinstance(layers[name], Conv1D)]):
        raise UserError(
            f"train.lora.init: PEFT's olora does not take layers like {some(turned)} of {model.config.model_type}, "
            "which hold their weights as [in, out]: use init: pissa"
        )
    renamed = _renamed(model, targets)
    if renamed and lora.dora:
        named = some(name for name in targets if _last(name) in renamed)
        raise UserError(
            f"train.lora.dora: of {model.config.model_type}, PEFT would load the adapter of {named} onto the fused "
            "experts, and what it would load rightly has no dora: take dora out, or leave "
            f"{', '.join(sorted(renamed))} out of train.lora.targets"
        )
    if lora.init == "eva":
        warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage")
    try:
        with _as_named() if renamed else nullcontext():
            adapted = get_peft_model(
                model,
                LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    target_modules=_short(targets, layers),
                    target_parameters=sorted({".".join(name.split(".")[-2:]) for name in experts}) or None,
                    modules_to_save=spelled or None,
                    ensure_weight_tying=bool(lora.modules_to_save) and _tied(model),
                    trainable_token_indices=_rows(model, lora.new_tokens, folder) if lora.new_tokens else None,
                    use_rslora=lora.rslora,
                    use_dora=lora.dora,
                    init_lora_weights=STARTS.get(lora.init, lora.init),
                    eva_config=EvaConfig(rho=1.0) if lora.init == "eva" else None,
                    task_type="CAUSAL_LM",
                ),
            )
    except ValueError as error:
        raise UserError(f"train.lora: {model.config.model_type} does not take this adapter: {error}") from error
    _refuse_others(adapted, modules, {name for name in targets if not _within(name, saved)} | experts)
    _refuse_torn(model)
    for name, module in _adapters(adapted):
        narrowest = min(module.in_features, module.out_features)
        if lora.rank > narrowest:
            raise UserError(
                f"train.lora.rank is {lora.rank}, but {name} is only {narrowest} wide: choose a rank no larger, or "
                "leave that layer out of train.lora.targets"
            )
        # Autocast chooses the arithmetic; PEFT would lift the layer's input to float32 first.
        module.cast_input_dtype_enabled = False
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if lora.init == "loftq":
        quantization.start_from_loss(adapted, folder)
    if lora.init in checks.FROM_WEIGHTS:
        folding.remember(adapted)
    return adapted


def chosen(model: PreTrainedModel, lora: Lora) -> tuple[set[str], tuple[set[str], list[str]]]:
    """The layers that are adapted and the modules that train whole, with what PEFT is to call these. Raises UserError
    for a name that matches none, or one that cannot be adapted."""
    return _targets(model, lora.targets, _layers(model)), _whole(model, lora.modules_to_save)


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def lift_inputs(model: PeftModel) -> None:
    """Let every adapter lift its layer's input to its own float32, for a model that also runs without autocast."""
    for _, module in _adapters(model):
        module.cast_input_dtype_enabled = True


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter as PEFT loads it onto the model it came from, with the same bytes every time."""
    adamw.widen(model)
    # TRL may have put a second one beside it: how it started, which training is held to.
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's blank model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = None  # a path of this machine
    config["eva_config"] = config["loftq_config"] = None
    config |= _survives(model, config)
    tied = getattr(model.peft_config["default"], "modules_to_tie", None)
    if tied and not {_last(name) for name in config["modules_to_save"]} & set(EMBEDDING_LAYER_NAMES):
        config["modules_to_save"] += sorted(tied)  # PEFT, which took it out, ties what it loads by these names alone
    for name in ("target_modules", "target_parameters"):
        if isinstance(config[name], list):
            config[name].sort()  # PEFT keeps a set
    if config["init_lora_weights"] == "eva":
        config["init_lora_weights"] = True  # it is done; PEFT would warn of a start that is missing
    config |= folding.unfold(model, folder / "adapter_model.safetensors")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _adapters(model: PeftModel) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name.removeprefix("base_model.model."), module


def _conversion() -> Any:
    """PEFT's module that renames targets; None in an older PEFT, which adapts the layers that it is told."""
    try:
        from peft.utils import transformers_weight_conversion
    except ImportError:
        return None
    return transformers_weight_conversion


def _renamed(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The last parts of layers' names that PEFT takes for a mixture's routed experts."""
    found: set[str] = set()
    conversion = _conversion()
    if conversion is None:
        return found
    for last in {_last(name) for name in names}:
        config = LoraConfig(target_modules=[last])
        try:
            conversion.convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # of fused weights it wants all
            found.add(last)
        if set(config.target_modules or ()) != {last}:
            found.add(last)
    return found


@contextmanager
def _as_named() -> Iterator[None]:
    """Have PEFT adapt the layers of the names that it is given: it offers no way to say so."""
    conversion = _conversion()
    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


def _survives(model: PeftModel, config: dict[str, Any]) -> dict[str, Any]:
    """What changes in a written config so that PEFT loads the adapter onto the layers that were trained."""
    base = model.get_base_model()
    layers = {name for name, module in _adapters(model) if not isinstance(module, ParamWrapper)}
    renamed = _renamed(base, layers)
    if not renamed:
        return {}
    return {
        "target_modules": [name for name in config["target_modules"] if _last(name) not in renamed],
        "target_parameters": [
            *(config["target_parameters"] or ()),
            *(f"{name}.weight" for name in layers if _last(name) in renamed),
        ],
        "lora_dropout": 0.0,  # with which PEFT takes no parameters; it is for training
    }


def _refuse_others(adapted: PeftModel, modules: dict[int, str], meant: set[str]) -> None:
    """Raise UserError unless the adapters are on the layers and fused weights that were meant, of `modules` by id."""
    found = set()
    for _, module in _adapters(adapted):
        name = modules[id(module.get_base_layer())]
        found.add(f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name)
    if found != meant:
        raise UserError(
            f"train.lora: PEFT does not adapt in {adapted.config.model_type} what targets and experts ask for: it "
            f"leaves out {some(meant - found)} and adapts {some(found - meant)} instead: name other layers in "
            "train.lora.targets"
        )


def _refuse_torn(model: PreTrainedModel) -> None:
    """Raise UserError where the embeddings of a model that is adapted no longer train as one with a head that shares
    their weights."""
    if not _tied(model):
        return
    inputs, head = (
        {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if inputs != head:
        raise UserError(
            f"train.lora.modules_to_save: in {model.config.model_type} the head shares the weights of the embeddings, "
            "and PEFT would train one without the other: take out what names them, or a module that holds one of them"
        )


def _refuse_untrainable(model: PreTrainedModel, lora: Lora, saved: Iterable[str], head: Iterable[str]) -> None:
    """Raise UserError for modules that should train in full and are held in few bits, and for a head that should be
    adapted, or embeddings that should train whole, and have some rows trained."""
    small = [name for name in saved if not all(p.is_floating_point() for p in model.get_submodule(name).parameters())]
    if small:
        raise UserError(
            f"train.lora.modules_to_save: train.quantize holds {some(small)} in few bits, which cannot train in full: "
            "adapt it by train.lora.targets, or take quantize out"
        )
    if lora.new_tokens and (adapted := sorted(head)):
        raise UserError(
            f"train.lora.new_tokens trains some rows of {adapted[0]}, which train.lora.targets would adapt: leave it "
            "out of the targets, or name the embeddings in train.lora.modules_to_save instead of the tokens"
        )
    if lora.new_tokens and (whole := sorted(set(saved) & set(_ends(model)))):
        raise UserError(
            f"train.lora.new_tokens trains some rows of {whole[0]}, which train.lora.modules_to_save trains whole: "
            "keep one of the two"
        )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _targets(model: PreTrainedModel, targets: str | tuple[str, ...], layers: dict[str, nn.Module]) -> set[str]:
    if isinstance(targets, str):
        return {name for name, module in layers.items() if _is_plain(module)} - _head(model, layers)
    found: set[str] = set()
    for target in targets:
        meant = {name for name in layers if matches(target, name)}
        if not meant:
            choices = sorted({_last(name) for name in layers})
            raise UserError(f"train.lora.targets: no layer is called {target!r}; there are {', '.join(choices)}")
        if _tied(model) and model.get_output_embeddings() in [layers[name] for name in meant]:
            raise UserError(
                f"train.lora.targets: {target!r} shares its weights with the embeddings, so an adapter on it cannot be "
                "merged: leave it out, or name the embeddings in train.lora.modules_to_save"
            )
        found |= meant
    return found


def _is_plain(module: Any) -> bool:
    """Whether a layer is linear and no more: not a mixture's router or gate."""
    library = type(module).__module__.partition(".")[0]
    return isinstance(module, Conv1D) or (library in ("torch", "bitsandbytes") and module.out_features > 1)


def _head(model: PreTrainedModel, layers: dict[str, nn.Module]) -> set[str]:
    head = model.get_output_embeddings()
    return {name for name, module in layers.items() if module is head}


def _short(meant: set[str], layers: dict[str, nn.Module]) -> list[str]:
    """The layers by the last parts of their names, if those name no other layer."""
    ends = {_last(name) for name in meant}
    return sorted(ends if all(n in meant for n in layers if _last(n) in ends) else meant)


def _tied(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)


def _whole(model: PreTrainedModel, wanted: tuple[str, ...]) -> tuple[set[str], list[str]]:
    """The modules whose names are some wanted ones or end with them as whole parts, and what to call them to PEFT,
    which looks only at how a name ends: `input_layernorm` ends with `norm`."""
    every = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    filled = [name for name in every if next(model.get_submodule(name).parameters(), None) is not None]
    found: set[str] = set()
    spelled: list[str] = []
    for wanted_name in wanted:
        meant = {name for name in filled if f".{name}".endswith(f".{wanted_name}")}
        if not meant:
            raise UserError(
                f"train.lora.modules_to_save: no module is called {wanted_name!r}{nearest(wanted_name, filled)}"
            )
        names = [wanted_name] if _ending(every, (wanted_name,)) == meant else sorted(meant)
        if others := _ending(every, names) - meant:
            raise UserError(
                f"train.lora.modules_to_save: for {wanted_name!r}, PEFT would train {some(others)} besides "
                f"{some(meant)}: name another module"
            )
        found |= meant
        spelled += names
    for name in sorted(found):
        if whole := [other for other in found if name.startswith(f"{other}.")]:
            raise UserError(
                f"train.lora.modules_to_save: {name} is a part of {min(whole)}, which trains whole: name one of the two"
            )
    if _tied(model) and found & set(_ends(model)):
        spelled += _ends(model)[-1:]  # the head, by whose name PEFT knows that it is tied
    return found, list(dict.fromkeys(spelled))


def _ends(model: PreTrainedModel) -> list[str]:
    """The names of the embeddings and of the head."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in (model.get_input_embeddings(), model.get_output_embeddings())]


def _ending(names: Iterable[str], ends: Sequence[str]) -> set[str]:
    return {name for name in names if name.endswith(tuple(ends))}


def _rows(model: PreTrainedModel, tokens: tuple[str, ...], folder: Path) -> dict[str, list[int]]:
    """The rows of the embeddings, and of a head that is not tied to them, that belong to some tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    known = tokenizer.get_vocab()
    for token in tokens:
        if token not in known:
            raise UserError(
                f"train.lora.new_tokens: the model's tokenizer has no token {token!r}: add it with "
                "fetch.model.new_tokens"
            )
    rows = sorted(known[token] for token in tokens)
    return dict.fromkeys(_ends(model)[:1] if _tied(model) else _ends(model), rows)


def _experts(model: PreTrainedModel) -> set[str]:
    """The fused weights [experts, ., .] of a mixture's layers."""
    config = model.config.get_text_config()
    counts = {
        getattr(config, name, None)
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    }
    found = {
        name for name, parameter in model.named_parameters() if parameter.ndim == 3 and parameter.shape[0] in counts
    }
    if not found:
        raise UserError(
            f"train.lora.experts: {config.model_type} has no experts whose weights lie in one piece: take the key out"
        )
    return found
