"""What a recipe names of a model, looked for as soon as the model is there: a misspelt name in `lora.targets`,
`lora.modules_to_save`, `full.only` or `full.freeze` is told before the data is prepared.

    refuse_unknown(config, folder)     # UserError, in the words of training itself

The names that a model's files give cost nothing to read. They are not always those that transformers gives its layers,
so only when one is not among them is the model built, without weights, and asked.
"""

import json
from pathlib import Path

from stages.train import TrainConfig
from stages.train.patterns import matches

__all__ = ["INDEX", "names_of", "refuse_unknown"]

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def names_of(config: TrainConfig) -> tuple[str, ...]:
    """The names, globs and expressions that `train` brings."""
    if config.method == "full":
        return (*config.full.only, *config.full.freeze)
    targets = () if isinstance(config.lora.targets, str) else config.lora.targets
    return (*targets, *config.lora.modules_to_save)


def refuse_unknown(config: TrainConfig, folder: Path) -> None:
    """Raise UserError for a name that matches nothing in the model of `folder`, which holds its config and either the
    index of its weights or these."""
    stored = _stored(folder)
    if not all(any(matches(pattern, name) for name in stored) for pattern in names_of(config)):
        _refuse(config, folder)


def _stored(folder: Path) -> list[str]:
    """The weights by name, and what they are the weights of."""
    if (folder / INDEX).exists():
        weights = list(json.loads((folder / INDEX).read_text())["weight_map"])
    else:
        from safetensors import safe_open

        with safe_open(folder / WEIGHTS, framework="np") as file:
            weights = list(file.keys())
    return [*weights, *(name.rpartition(".")[0] for name in weights)]


def _refuse(config: TrainConfig, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.train import adapters, freezing

    described = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described)
    if config.method == "full":
        freezing.freeze(model, config.full.model_copy(update={"spectrum": None}))
    else:
        adapters.chosen(model, config.lora)
