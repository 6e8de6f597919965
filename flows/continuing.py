"""Going on from the model in production (`fetch.continuing`): which weights a run starts from, and on which rows.

It trains on the shards that production's run did not have: those whose rows are other bytes than any of that run's.
Where there are none, it is production's own training once more, with the start and the rows that this had, so that
every stage is found and nothing runs. What is held out is never trained on, and always there.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from stages.errors import UserError
from stages.identity import Json, Tree
from stages.production import Name, Production
from stages.store import Artifact, Store


@dataclass(frozen=True)
class Start:
    """Where a training begins."""

    weights: Name | None
    """merge's artifact; None for the base model."""
    seen: Name | None
    """fetch's artifact of the run that made them: its rows are not trained on again."""
    run: str
    """That run."""

    @property
    def document(self) -> Json:
        """As a run's record has it."""
        return {"weights": self.weights, "seen": self.seen, "run": self.run}


BASE = Start(None, None, "")
"""The base model, and all rows."""


def start_and_rows(
    store: Store, standing: Production | None, data: Tree, heldout: Collection[str]
) -> tuple[Start, Tree]:
    """Where a run starts whose fetch brought the shards `data`, and those of them that convert is to read.

    `heldout` names the sources whose rows only measure. Raises UserError when the store has lost what it needs.
    """
    if standing is None:
        return BASE, data
    record = _record(store, standing.now.run)
    had = _tree(store, "fetch", record["stages"]["fetch"]).folder("data")
    start = Start(standing.now.model, _named(record["stages"]["fetch"]), standing.now.run)
    then = _heldout_then(record)
    measured = Tree(tuple(file for file in had.files if _is_heldout(file.path, then)))
    had = Tree(tuple(file for file in had.files if not _is_heldout(file.path, then)))
    _refuse_trained(data, had, measured, heldout, standing.now.run)
    rows = _unseen(data, had, heldout)
    if _trains(rows, heldout):
        return start, rows
    before = _start_of(record)
    seen = _tree(store, "fetch", before.seen).folder("data") if before.seen else Tree(())
    trained = _unseen(had, seen, heldout).files
    kept = [file for file in trained if not _is_heldout(file.path, heldout)]
    return before, Tree(tuple(sorted([*kept, *(f for f in data.files if _is_heldout(f.path, heldout))])))


def weights_of(store: Store, start: Start) -> Tree | None:
    """The model's files that a training starts from; None for the base model's. Raises UserError when they are gone."""
    if start.weights is None:
        return None
    tree = _tree(store, "merge", start.weights)
    if store.missing(tree):
        raise UserError(f"{_lost(store, 'merge', start.weights)}: some of its files are gone")
    return Tree(tuple(file for file in tree.files if file.path != "merge.json"))


def refuse_another_base(store: Store, standing: Production | None, model: Json) -> None:
    """Raise UserError when production's run had another base model than what fetch resolved `model` to."""
    if standing is None:
        return
    parts = {part["name"]: part["config"] for part in _record(store, standing.now.run)["parts"]}
    if parts.get("model") != model:
        raise UserError(
            "fetch.continuing: the model in production was trained from another fetch.model than this one, so there is "
            "no going on from it: take `continuing` out until a model of the new one is in production"
        )


def _record(store: Store, run: str) -> Mapping[str, Any]:
    record = store.read_run(run)
    if record is None or "fetch" not in record["stages"]:
        raise UserError(
            f"fetch.continuing: the record of run {run}, which made the model in production, is gone, so what it has "
            "seen is not known: take `continuing` out for one run"
        )
    return record


def _start_of(record: Mapping[str, Any]) -> Start:
    start = record.get("start")
    return Start(start["weights"], start["seen"], start["run"]) if start else BASE


def _named(stage: Mapping[str, Any]) -> Name:
    return {"key": stage["key"], "digest": stage["digest"]}


def _tree(store: Store, stage: str, name: Name) -> Tree:
    found: Artifact | None = store.recall(stage, name["key"], name["digest"])
    if found is None:
        raise UserError(f"{_lost(store, stage, name)}: take `continuing` out for one run")
    return found.tree


def _lost(store: Store, stage: str, name: Name) -> str:
    return f"fetch.continuing: {store.url} no longer holds {stage} {name['key'][:12]}, from which training would go on"


def _is_heldout(path: str, heldout: Collection[str]) -> bool:
    return path.partition("/")[0] in heldout


def _heldout_then(record: Mapping[str, Any]) -> Collection[str]:
    """The sources whose rows only measured in a run."""
    configs = [part["config"] for part in record["parts"]]
    return {config["source"] for config in configs if config.get("split") == "heldout"}


def _refuse_trained(data: Tree, trained: Tree, measured: Tree, heldout: Collection[str], run: str) -> None:
    """Raise UserError for rows that are to measure a model that has trained on them. What was `measured` was not, also
    where it stood among what trained."""
    aside = _rows(measured)
    known = {digest: shard for digest, shard in _rows(trained).items() if digest not in aside}
    for file in data.files:
        if _is_heldout(file.path, heldout) and _holds_rows(file.path) and file.sha256 in known:
            raise UserError(
                f"fetch.continuing: {_shard(file.path)} is held out, and the model in production, which run {run} "
                f"made, was trained on the same rows as {known[file.sha256]}: it would be measured on what it has "
                "seen. Take `split: heldout` out of that source, or `continuing` out for one run"
            )


def _rows(tree: Tree) -> Mapping[str, str]:
    """The shards of a tree by the digests of their rows."""
    return {file.sha256: _shard(file.path) for file in tree.files if _holds_rows(file.path)}


def _trains(rows: Tree, heldout: Collection[str]) -> bool:
    return any(not _is_heldout(file.path, heldout) for file in rows.files)


def _unseen(data: Tree, seen: Tree, heldout: Collection[str]) -> Tree:
    """The shards whose rows are not among those seen, and all that are held out."""
    known = _rows(seen)
    old = {_shard(f.path) for f in data.files if _holds_rows(f.path) and f.sha256 in known}
    return Tree(tuple(f for f in data.files if _is_heldout(f.path, heldout) or _shard(f.path) not in old))


def _shard(path: str) -> str:
    """The shard that a file belongs to."""
    return path.rpartition("/")[0]


def _holds_rows(path: str) -> bool:
    return path.rpartition("/")[2].startswith("rows.")
