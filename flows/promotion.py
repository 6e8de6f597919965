"""`regrow promote` and `regrow rollback`: a person moves `<name>/production`, and the model is delivered where its
recipe says. Plain store code: no Prefect.

Both move the ref only if it still says what was read when the command started: what somebody else did meanwhile stands,
and the command says so.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from flows.run import production_of
from flows.settle import named
from stages.deliver import deliver, delivered, delivery
from stages.errors import UserError
from stages.production import Move, person, production
from stages.production import promote as moved
from stages.production import rollback as moved_back
from stages.runtime import Runtime
from stages.store import Artifact, Store

DIGITS = 4
"""A key may be named by so many of its first digits."""


def promote(store: Store, runtime: Runtime, name: str, what: str | None = None, anyway: bool = False) -> Move:
    """Let `name`'s production ref name the model of a run, of a card's or weights' key, or of its newest run.

    Raises UserError when there is no such model, when its gate was not passed (unless `anyway`), when it stands there
    already, when its files are gone, and when somebody moved the ref at the same moment.
    """
    seen = production(store, name)
    record = _record(store, name, what)
    card, weights = (_artifact(store, name, record, stage) for stage in ("publish", "merge"))
    reasons = "; ".join(card.facts["reasons"])
    if not card.facts["passed"] and not anyway:
        raise UserError(
            f"{name}: the gate was not passed by run {record['run']}: {reasons}. Promote it all the same with --anyway"
        )
    if seen is not None and seen.now.model == named(weights):
        raise UserError(f"{name}/production already names this model (merge {weights.key[:12]})")
    compared = production_of(record)
    move = moved(
        store,
        name,
        seen,
        model=named(weights),
        card=named(card),
        run=record["run"],
        compared=compared.rival(weights.digest) if compared else None,
        why=reasons if card.facts["passed"] else f"although the gate was not passed: {reasons}",
        by=person(),
    )
    if move is None:
        raise UserError(
            f"{name}: production moved at this moment and was left as it is now; look at `regrow history {name}` and "
            "repeat the command if you still want it"
        )
    _deliver(store, runtime, card, weights, record)
    return move


def rollback(store: Store, runtime: Runtime, name: str) -> Move:
    """Let `name`'s production ref name the model that stood before. Raises UserError as `stages.production.rollback`,
    and when that model's files are gone."""
    move = moved_back(store, name)
    record = store.read_run(move.run)
    found = [
        store.recall(stage, of["key"], of["digest"]) for stage, of in (("publish", move.card), ("merge", move.model))
    ]
    if record is not None and found[0] is not None and found[1] is not None:
        _deliver(store, runtime, found[0], found[1], record)
    return move


def _record(store: Store, name: str, what: str | None) -> Mapping[str, Any]:
    """The run that made the model."""
    with_card = (r for r in records_of(store, name) if {"publish", "merge"} <= r["stages"].keys())
    if what is None:
        found = next(with_card, None)
        if found is None:
            raise UserError(
                f"{name}: no run of it made a card yet; run its recipe first (`regrow show` lists the runs)"
            )
        return found
    for record in with_card:
        keys = [record["stages"][stage]["key"] for stage in ("publish", "merge")]
        if record["run"] == what or (len(what) >= DIGITS and any(key.startswith(what) for key in keys)):
            return record
    raise UserError(
        f"{name}: no run with a card is called {what!r}, and none made that key; see `regrow history {name}`"
    )


def records_of(store: Store, name: str) -> Iterator[dict[str, Any]]:
    """The records of a recipe's runs, the one written last first."""
    return (record for _, record in store.runs() if record.get("recipe") == name)


def _artifact(store: Store, name: str, record: Mapping[str, Any], stage: str) -> Artifact:
    entry = record["stages"][stage]
    found = store.recall(stage, entry["key"], entry["digest"])
    missing = store.missing(found.tree) if found else [f"{stage} {entry['key'][:12]}"]
    if found is None or missing:
        raise UserError(
            f"{name}: what run {record['run']} made is no longer in {store.url} ({missing[0]}); run its recipe again"
        )
    return found


def _deliver(store: Store, runtime: Runtime, card: Artifact, weights: Artifact, record: Mapping[str, Any]) -> None:
    """Bring the model to where the run's recipe publishes. Raises UserError when that place cannot be written."""
    publish = (yaml.safe_load(record["text"]) or {}).get("publish") or {}
    to, tree = publish.get("to") or "", delivery(weights.tree, card.tree)
    options = runtime.options_for(to)
    if to and not delivered(to, tree, options):
        deliver(to, tree, store, private=publish.get("private", True), options=options)
