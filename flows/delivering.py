"""Brings the model that production names to where its recipe publishes it, one delivery to a place at a time.

The ref moves first, so whoever moved it last delivers last: a delivery that comes to its turn when production names
another model by then leaves the place to that one. Two that wrote at once, say a run's and a rollback's, would leave
files of both, or the model that was just taken out of production.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from flows.run import records_of
from stages.deliver import absolute, deliver, delivered, delivery, holds
from stages.errors import UserError
from stages.identity import sha256_text
from stages.lease import lease
from stages.production import Move, Production, person, production
from stages.publish import PublishConfig
from stages.runtime import Runtime
from stages.store import Artifact, Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a run's model goes."""

    to: str
    """A folder by its absolute path, a URL, or empty: nowhere."""
    private: bool
    """Whether a repository made on the Hub is private."""


def bring(
    store: Store,
    runtime: Runtime,
    name: str,
    place: Place,
    weights: Artifact,
    card: Artifact,
    *,
    moved: bool,
) -> Literal["nowhere", "there", "arrived", "elsewhere"]:
    """Deliver the model of the recipe called `name`; `moved` says that the ref was moved to it just now, so that others
    may be delivering what stood before. `nowhere`: none is asked for; `there`: it was there already; `elsewhere`:
    production names another model by now. Raises UserError when the place cannot be written or its lease is lost, and
    BadBlob."""
    to, tree = place.to, delivery(weights.tree, card.tree)
    options = runtime.options_for(to)
    if not to:
        return "nowhere"
    if not moved and delivered(to, tree, options):
        return "there"
    owner = f"{person()}, who delivers {name}"
    with lease(store, "deliver", sha256_text(to), runtime.lease_seconds, owner, _log.warning) as held:

        def go_on() -> None:
            if held.lost.is_set():
                raise UserError(
                    f"publish.to: {to}: stopped before all was delivered, for another may be delivering there by now: "
                    f"the lease on that place was lost, {held.why}. The next run delivers what production names"
                )

        standing = production(store, name)
        if standing is None or standing.now.model["digest"] != weights.digest:
            return "elsewhere"
        if delivered(to, tree, options):
            return "there"
        deliver(to, tree, store, name, private=place.private, options=options, go_on=go_on)
    return "arrived"


def bring_standing(store: Store, runtime: Runtime, name: str, to: str) -> None:
    """Deliver what production names to `to`, if it belongs there and could not be delivered: the next runs may fail
    their gate for weeks, and what is served would be the model before. Where the model is, its card is left alone: a
    later run may have written a newer one than the move names. Raises as `bring`."""
    standing = production(store, name) if to else None
    if standing is None:
        return
    place = next((place for place in places_of(store, name, standing) if place.to == to), None)
    if place is None:
        return
    model, card = standing.now.model, standing.now.card
    weights = store.recall("merge", model["key"], model["digest"])
    published = store.recall("publish", card["key"], card["digest"])
    if weights is None or published is None:
        return
    if holds(to, weights.tree, published.tree, runtime.options_for(to)):
        return
    if bring(store, runtime, name, place, weights, published, moved=False) == "arrived":
        _log.warning(
            "%s: delivered the model of run %s, which production names and which was not there", to, standing.now.run
        )


def places_of(store: Store, name: str, standing: Production) -> Iterator[Place]:
    """Where the model that production names belongs: where its run publishes and, after rollbacks, where the models did
    that they took away, for what is served there is looked at now."""
    for move in reversed(standing.moves):
        if (record := _record_of(store, name, move)) is not None:
            yield place_of(record)
        if move.what != "rolled back":
            return


def _record_of(store: Store, name: str, move: Move) -> Mapping[str, Any] | None:
    """The record of a move's run; of an older move, which no longer names it, that of the last run with its card."""
    if move.run:
        return store.read_run(move.run)
    made = {"merge": move.model["key"], "publish": move.card["key"]}
    stages = ((record, record["stages"]) for record in records_of(store, name))
    return next((r for r, had in stages if all(had.get(s, {}).get("key", "").startswith(made[s]) for s in made)), None)


def place_of(record: Mapping[str, Any]) -> Place:
    """Where a run's recipe publishes, as it was then, whatever a newer version would say of it."""
    publish = (yaml.safe_load(record["text"]) or {}).get("publish") or {}
    said = publish.get("private")  # null, and "false" as text, which older records have, too
    private = PublishConfig().private if said is None else PublishConfig(private=said).private
    return Place(record.get("to") or absolute(publish.get("to") or ""), private)
