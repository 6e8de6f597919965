"""Which model a person means: by a recipe, the name of one (production), a run, or a folder.

No Prefect and no torch in here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.graph import WIRING
from flows.plan import make_plan
from flows.recipe import load
from flows.run import start
from stages.errors import UserError
from stages.home import expanded
from stages.identity import Tree
from stages.production import production
from stages.runtime import Runtime
from stages.sources import folder as whole
from stages.store import Store

BASE = WIRING["merge"]["model"]
"""What of fetch's artifact is the model before training."""


@dataclass(frozen=True)
class Chosen:
    """A tuned model, and where the one before training lies."""

    name: str
    """What people call it."""
    what: str
    """Which one exactly, for a person."""
    tuned: Tree | Path
    base: Tree | None
    """None where nobody knows any more what it came from."""

    def folder(self, store: Store) -> Path:
        """The tuned model as a local folder. Raises BadBlob."""
        return self.tuned if isinstance(self.tuned, Path) else store.view(self.tuned)

    def base_folder(self, store: Store) -> Path:
        """The model before training as a local folder. Raises UserError when it is not known or gone."""
        missing = ["nothing says which it was"] if self.base is None else store.missing(self.base)
        if self.base is None or missing:
            raise UserError(f"{self.name}: the model before training is not in {store.url} ({missing[0]})")
        return store.view(self.base)


def choose(what: str, settings: Sequence[str], store: Store, runtime: Runtime) -> Chosen:
    """The model of a folder, of a recipe's file (with its `settings`), of the production ref `what`, or of a run.

    Raises UserError when there is none, with the command that makes it.
    """
    path = expanded(what, "model")
    if path.is_dir():
        return _of_folder(path, store)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _of_recipe(path, settings, store, runtime)
    if settings:
        raise UserError(f"--set: {what} is no recipe file, and only a recipe has keys to override")
    try:
        standing = production(store, what)
        last = store.read_ref(f"{what}/last")
        record = store.read_run(standing.now.run if standing else what)
    except UserError:  # not a name that a run can have
        standing = last = record = None
    if standing is not None:
        return _of_artifact(what, f"{what}/production, run {standing.now.run}", standing.now.model, record, store)
    if record is not None:
        return _of_run(record, store)
    if last is not None:
        run = last.document["run"]
        raise UserError(
            f"{what}/production names no model yet: `regrow promote {what}` lets it name the newest one, or ask for "
            f"that run's: {run}"
        )
    raise UserError(
        f"{what}: no folder, no recipe file, and nothing that ran in {store.url} is called so. A recipe is trained by "
        "`regrow run RECIPE`; `regrow show` lists what ran"
    )


def _of_folder(folder: Path, store: Store) -> Chosen:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: holds no model (no config.json). A model's folder is what `publish.to` names, or any that "
            "transformers saved"
        )
    names = [path.name for path in folder.iterdir()]
    whole.check(names, names, str(folder))
    try:
        stages = json.loads((folder / "lineage.json").read_text())["stages"]
    except (OSError, ValueError, KeyError):  # not one of ours
        stages = {}
    return Chosen(folder.resolve().name, str(folder), folder.resolve(), _base(stages, store))


def _of_recipe(path: Path, settings: Sequence[str], store: Store, runtime: Runtime) -> Chosen:
    loaded = load(path, settings)
    run = start(loaded, runtime, store)
    make_plan(run)
    if "merge" not in run.artifacts:
        more = "".join(f" --set {setting}" for setting in settings)
        raise UserError(
            f"{path}: nothing is trained yet with these settings; this makes it: regrow run {path} +merge{more}"
        )
    name = loaded.recipe.name
    merged = run.artifacts["merge"]
    return _checked(
        name, f"{path}, merge {merged.key[:8]}", merged.tree, BASE.select(run.artifacts["fetch"].tree), store
    )


def _of_run(record: Mapping[str, Any], store: Store) -> Chosen:
    name, run, stages = record["recipe"], record["run"], record["stages"]
    if "merge" not in stages:
        raise UserError(
            f"run {run} of {name} ({record['status']}) has trained nothing yet; this goes on with it: "
            f"regrow run {record['path'] or 'RECIPE'} +merge"
        )
    return _of_artifact(name, f"run {run} of {name}", stages["merge"], record, store)


def _of_artifact(
    name: str, what: str, model: Mapping[str, str], record: Mapping[str, Any] | None, store: Store
) -> Chosen:
    merged = store.recall("merge", model["key"], model["digest"])
    if merged is None:
        raise UserError(f"{name}: {store.url} no longer holds this model (merge {model['key'][:12]}); run its recipe")
    return _checked(name, what, merged.tree, _base(record["stages"] if record else {}, store), store)


def _checked(name: str, what: str, tree: Tree, base: Tree | None, store: Store) -> Chosen:
    if missing := store.missing(tree):
        raise UserError(f"{name}: {missing[0]} in {store.url}; `regrow run` makes it again")
    return Chosen(name, what, tree, base)


def _base(stages: Mapping[str, Mapping[str, str]], store: Store) -> Tree | None:
    fetch = stages.get("fetch")
    found = store.recall("fetch", fetch["key"], fetch["digest"]) if fetch else None
    return BASE.select(found.tree) if found else None
