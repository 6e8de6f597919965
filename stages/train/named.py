"""What a recipe names of a model, looked for as soon as the model is there: a misspelt name in `lora.targets`,
`lora.modules_to_save`, `full.only` or `full.freeze` is told before the data is prepared.

    refuse_unknown(config, folder)     # UserError, in the words of training itself

The names that a model's files give cost nothing to read. They are not always those that transformers gives its layers,
so only when one is not among them is the model built, without weights, and asked.
"""

from pathlib import Path

from stages import weight_files
from stages.errors import UserError
from stages.train import TrainConfig
from stages.train.patterns import matches

__all__ = ["names_of", "refuse_unknown"]

NO_LAYERS = ("norm", "embed")
"""Parts of the names of weights that belong to no linear layer, in most models."""


def names_of(config: TrainConfig) -> tuple[str, ...]:
    """The names, globs and expressions that `train` brings."""
    if config.method == "full":
        return (*config.full.only, *config.full.freeze)
    return (*_targets(config), *config.lora.modules_to_save)


def refuse_unknown(config: TrainConfig, folder: Path) -> None:
    """Raise UserError for a name that matches nothing in the model of `folder`, which holds its config and either the
    index of its weights or these."""
    weights = weight_files.names(folder)
    modules = [name.rpartition(".")[0] for name in weights]
    layers = [name for name in modules if not any(part in name for part in NO_LAYERS)]
    if config.method == "full":
        known = all(any(matches(pattern, name) for name in weights) for pattern in names_of(config))
    else:
        known = all(any(matches(target, name) for name in layers) for target in _targets(config))
        known &= all(any(f".{name}".endswith(f".{end}") for name in modules) for end in config.lora.modules_to_save)
    if not known:
        _refuse(config, folder)


def _targets(config: TrainConfig) -> tuple[str, ...]:
    return () if isinstance(config.lora.targets, str) else config.lora.targets


def _refuse(config: TrainConfig, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.train import adapters, freezing

    try:
        described = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the model cannot be loaded for training: {error}") from error
    if config.method == "full":
        freezing.freeze(model, config.full.model_copy(update={"spectrum": None}))
    else:
        adapters.chosen(model, config.lora)
