"""`regrow promote` and `regrow rollback`: a person moves `<name>/production`, and the model is delivered where its
recipe says. Plain store code: no Prefect.

Both move the ref only if it still says what was read when the command started: what somebody else did meanwhile stands,
and the command says so. Both look first whether the store holds what is to be delivered. Where the delivery fails all
the same, the ref has moved, and `promote` for the model that it names delivers it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flows.delivering import Place, bring, place_of, places_of
from flows.run import production_of, records_of
from flows.settle import named
from stages.errors import UserError
from stages.production import Move, Name, Production, person, production
from stages.production import promote as moved
from stages.production import rollback as moved_back
from stages.runtime import Runtime
from stages.store import Artifact, BadBlob, Store

DIGITS = 4
"""A key may be named by so many of its first digits."""


def promote(store: Store, runtime: Runtime, name: str, what: str | None = None, anyway: bool = False) -> Move:
    """Let `name`'s production ref name the model of a run, of a card's or weights' key, or of its newest run, and
    deliver it. Where the ref names it already but it was not delivered, it is delivered now; the move is the old one.

    Raises UserError when there is no such model, when its gate was not passed or it was compared with another model
    than the one that stands (unless `anyway`), when it stands there already and was delivered, when its files are gone,
    when somebody moved the ref at the same moment, and, after the move, when it cannot be delivered; BadBlob then when
    the store's bytes turn out damaged.
    """
    seen = production(store, name)
    record = _record(store, name, what)
    run = record["run"]
    card, weights = (_artifact(store, name, run, stage, record["stages"][stage]) for stage in ("publish", "merge"))
    reasons = "; ".join(card.facts["reasons"])
    if not card.facts["passed"] and not anyway:
        raise UserError(
            f"{name}: the gate was not passed by run {run}: {reasons}. Promote it all the same with --anyway"
        )
    if seen is not None and seen.now.model["digest"] == weights.digest:
        places = [place_of(record), *places_of(store, name, seen)]
        if _deliver(store, runtime, record, places, card, weights, moved=False):
            return seen.now
        raise UserError(f"{name}/production already names this model (merge {seen.now.model['key'][:12]})")
    before = production_of(record)
    compared = before.rival(weights.digest) if before else None
    uncompared = _uncompared(seen, compared, weights)
    if uncompared and not anyway:
        raise UserError(
            f"{name}: {uncompared}, so nothing says that run {run} is no worse. Run its recipe again to compare the "
            "two, or promote it all the same with --anyway"
        )
    although = [f"although {uncompared}"] if uncompared else []
    move = moved(
        store,
        name,
        seen,
        model=named(weights),
        card=named(card),
        run=run,
        compared=compared,
        why="; ".join([reasons if card.facts["passed"] else f"although the gate was not passed: {reasons}", *although]),
        by=person(),
    )
    if move is None:
        raise UserError(
            f"{name}: production moved at this moment and was left as it is now; look at `regrow history {name}` and "
            "repeat the command if you still want it"
        )
    _deliver(store, runtime, record, [place_of(record)], card, weights, moved=True)
    return move


def _uncompared(seen: Production | None, compared: Name | None, weights: Artifact) -> str:
    """That another model stands than the gate compared with, in words; empty where it is that one, where none stands,
    and for a model that stood before: who names that wants it back."""
    if seen is None or seen.stood(weights.digest) or (compared or {}).get("digest") == seen.now.model["digest"]:
        return ""
    then = f"with merge {compared['key'][:8]}" if compared else "with no model in production"
    return f"its gate compared {then}, and production names merge {seen.now.model['key'][:8]} of run {seen.now.run}"


def rollback(store: Store, runtime: Runtime, name: str) -> Move:
    """Let `name`'s production ref name the model that stood before, and deliver it: where its recipe says, and where
    the recipe of the replaced one does. Raises UserError as
    `stages.production.rollback`, and before the move when the model's files or its run's record are gone; after it as
    `promote`."""
    move = moved_back(store, name, check=lambda move: _of_move(store, name, move))
    record, card, weights = _of_move(store, name, move)
    standing = production(store, name)
    assert standing is not None
    _deliver(store, runtime, record, places_of(store, name, standing), card, weights, moved=True)
    return move


def _of_move(store: Store, name: str, move: Move) -> tuple[Mapping[str, Any], Artifact, Artifact]:
    """The run's record, the card and the weights of a move. Raises UserError when the store has lost one of them."""
    record = store.read_run(move.run)
    if record is None:
        raise UserError(
            f"{name}: run {move.run} is no longer on record in {store.url}, so nothing says where its model goes; name "
            f"another one with `regrow promote {name} RUN`, or run its recipe again"
        )
    card, weights = (
        _artifact(store, name, move.run, stage, named)
        for stage, named in (("publish", move.card), ("merge", move.model))
    )
    return record, card, weights


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
    matching: dict[str, Mapping[str, Any]] = {}
    for record in with_card:
        merged, keys = record["stages"]["merge"]["key"], [record["stages"][s]["key"] for s in ("publish", "merge")]
        if record["run"] == what:
            return record
        if len(what) >= DIGITS and any(key.startswith(what) for key in keys):
            matching.setdefault(merged, record)
    if len(matching) > 1:
        raise UserError(
            f"{name}: the keys of {len(matching)} models start with {what}; give more digits, or name a run"
        )
    if not matching:
        raise UserError(
            f"{name}: no run with a card is called {what!r}, and none made that key; see `regrow history {name}`"
        )
    return next(iter(matching.values()))


def _artifact(store: Store, name: str, run: str, stage: str, entry: Name) -> Artifact:
    found = store.recall(stage, entry["key"], entry["digest"])
    missing = store.missing(found.tree) if found else [f"{stage} {entry['key'][:12]}"]
    if found is None or missing:
        raise UserError(f"{name}: what run {run} made is no longer in {store.url} ({missing[0]}); run its recipe again")
    return found


def _deliver(
    store: Store,
    runtime: Runtime,
    record: Mapping[str, Any],
    places: Iterable[Place],
    card: Artifact,
    weights: Artifact,
    *,
    moved: bool,
) -> bool:
    """Bring the model of a run to each of the places, whatever became of the others; whether it came to one just now.
    Raises UserError when a place cannot be written, and BadBlob."""
    arrived, errors = False, list[UserError | BadBlob]()
    for place in dict.fromkeys(places):
        try:
            arrived |= bring(store, runtime, record["recipe"], place, weights, card, moved=moved) == "arrived"
        except (UserError, BadBlob) as error:
            errors.append(error)
    if errors:
        for other in errors[1:]:
            errors[0].add_note(str(other))
        name = record["recipe"]
        again = f"regrow promote {name} {record['run']}" + ("" if card.facts["passed"] else " --anyway")
        errors[0].add_note(f"{name}/production names it; deliver it with: {again}")
        raise errors[0]
    return arrived
