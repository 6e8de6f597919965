"""The recipe's JSON schema, for editors: `regrow schema`, kept in `docs/recipe.schema.json`.

The recipe's types say all but what depends on a choice: the options of an objective, a format and a reward. Those are
added here, as a condition for each choice.
"""

import json
from collections.abc import Mapping
from typing import Any

from flows.recipe import Recipe
from stages import formats, objectives, rewards
from stages.stage import StageConfig

PLACE = "#/$defs/{model}"


def text() -> str:
    """The schema as it stands in `docs/recipe.schema.json`."""
    whole = Recipe.model_json_schema()
    types = whole["$defs"]
    _choose(types, "TrainConfig", "objective", "objective_options", _options(objectives), default="sft")
    _choose(types, "ConvertConfig", "format", "options", _options(formats), default="auto")
    _choose(types, "RewardChoice", "reward", "options", _options(rewards))
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}, indent=2)


def _options(choices: Any) -> dict[str, type[StageConfig]]:
    """By name: the options of everything that a package declares."""
    return {name: choices.find(name).options for name in choices.names()}


def _choose(
    types: dict[str, Any],
    owner: str,
    choice: str,
    key: str,
    options: Mapping[str, type[StageConfig]],
    default: str = "",
) -> None:
    """Have a type's `key` be what its `choice` says; a choice that is not named here, such as a file, stays free."""
    conditions = []
    for name, kind in options.items():
        own = kind.model_json_schema(ref_template=PLACE)
        types.update(own.pop("$defs", {}))
        chosen = {"properties": {choice: {"const": name}}, **({} if name == default else {"required": [choice]})}
        conditions.append({"if": chosen, "then": {"properties": {key: own}}})
    types[owner]["allOf"] = conditions
