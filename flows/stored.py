"""A recipe as people name it in a form or a schedule: inline, as a file, or as the name it ran under before.

No Prefect in here.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import yaml
from pydantic import Field

from flows.recipe import Loaded, Recipe, check, load, loads
from flows.strict_yaml import Document
from stages.errors import UserError
from stages.home import expanded
from stages.store import Store

Stored = Annotated[
    str,
    Field(
        min_length=1,
        title="A stored recipe",
        description="A recipe's YAML file on the worker's machine, or the name of a recipe that ran before, "
        "which is then as its last run that went all the way had it.",
    ),
]
Inline = Annotated[Recipe, Field(title="A recipe, written here")]
AnyRecipe = Stored | Inline
"""What a flow takes as its recipe."""


def recorded(record: Mapping[str, Any]) -> Loaded:
    """The recipe of a run as it was when the run began, with what the files that it names said then: a template or
    Python of one's own that was edited since is another recipe's. Raises UserError when it is not valid any more."""
    if "asked" not in record:  # by a version that did not keep it
        return loads(record["text"], record["path"])
    recipe = check(record["asked"], Document(record["asked"], {}), f"run {record['run']}")
    settings = tuple(record.get("settings", ()))
    return Loaded(recipe=recipe, text=record["text"], path=record["path"], settings=settings)


def recipe_of(source: str | Recipe, settings: Sequence[str], store: Store) -> Loaded:
    """The recipe with its `a.b=value` settings applied; of a name, as its last run that went all the way had it, with
    that run's settings. Raises UserError when it is not there or not valid."""
    if isinstance(source, Recipe):
        text = yaml.safe_dump(source.model_dump(mode="json", exclude_unset=True), sort_keys=False)
        return loads(text, "recipe", settings)
    path = expanded(source, "recipe")
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return load(path, settings)
    ref = store.read_ref(f"{source}/last") if "/" not in source else None
    if ref is None:
        raise UserError(
            f"recipe `{source}`: there is no such file on this machine, and no recipe of that name ran in {store.url}"
        )
    record = store.read_run(ref.document.get("whole") or ref.document["run"])  # by a version that did not keep `whole`
    if record is None or "publish" not in record["stages"]:
        told = f"only some of its stages ran in {store.url}, which may have been a trial"
        raise UserError(f"recipe `{source}`: {told}: run it to its end once, or name its file")
    found = loads(record["text"], record["path"] or source, settings)
    return found.model_copy(update={"settings": (*record.get("settings", ()), *settings), "run": record["run"]})
