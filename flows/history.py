"""`regrow history NAME`: which models stood in production and why, and what the runs beside them came to."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.run import records_of
from stages.compare import UNBOUNDED
from stages.errors import UserError
from stages.identity import Json
from stages.production import Move, production
from stages.store import Store

LATEST = 20
"""Runs and moves that are shown."""


@dataclass(frozen=True)
class Event:
    """One line of a name's history."""

    at: str
    what: str
    """`promoted`, `rolled back`, `declined`, `gate failed`, `failed`, `suspended`, …"""
    model: str
    """Key of the weights, or empty."""
    run: str
    by: str
    why: str
    scores: Mapping[str, Json]
    """Task to the tuned model's interval, of a run that has a card."""


def events_of(store: Store, name: str, most: int = LATEST) -> list[Event]:
    """The latest events of a name, newest first. Raises UserError when it never ran."""
    seen = production(store, name)
    moves = list(reversed(seen.moves if seen else []))[:most]
    records = {record["run"]: record for record in islice(records_of(store, name), most)}
    if not moves and not records:
        raise UserError(f"no run is called {name} in {store.url}; `regrow show` lists the latest")
    # Old moves no longer name their runs; but a run that moved production has its move.
    moved = {run for run, record in records.items() if (record.get("outcome") or {}).get("production") == "moved"}
    told = {move.run for move in moves} | moved
    events = [_moved(move, records.get(move.run)) for move in moves]
    events += [_ran(record) for run, record in records.items() if run not in told]
    return sorted(events, key=lambda event: event.at, reverse=True)[:most]


def show_history(store: Store, name: str, console: Console, as_json: bool) -> None:
    """Show a name's history: the model that stands, then the events."""
    events, seen = events_of(store, name), production(store, name)
    if as_json:
        standing = asdict(seen.now) if seen else None
        console.print_json(json.dumps({"name": name, "production": standing, "events": [asdict(e) for e in events]}))
        return
    if seen:
        console.print(f"{name}/production names {seen.now.model['key'][:8]}, {seen.now.what} by {escape(seen.now.by)}")
    else:
        console.print(f"{name}/production names nothing yet")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("when (UTC)", "what", "model", "run"):
        table.add_column(column, no_wrap=True)
    table.add_column("score", overflow="fold")
    for event in events:
        at = event.at[:16].replace("T", " ")
        table.add_row(at, STYLES.get(event.what, "{}").format(event.what), event.model[:8], event.run, _scores(event))
    console.print(table)
    if events[0].why:
        console.print(f"latest: {escape(events[0].why)}")


STYLES = {
    "promoted": "[green]{}[/]",
    "rolled back": "[yellow]{}[/]",
    "gate failed": "[red]{}[/]",
    "failed": "[red]{}[/]",
    "suspended": "[yellow]{}[/]",
    "interrupted": "[yellow]{}[/]",
}


def _scores(event: Event) -> str:
    shown = list(event.scores.values())[:3]
    return ", ".join(f"{s['value']:.3f}" if UNBOUNDED in s else f"{100 * s['value']:.1f}" for s in shown)


def _moved(move: Move, record: Mapping[str, Any] | None) -> Event:
    return Event(move.at, move.what, move.model["key"], move.run, move.by, move.why, _scored(record))


def _ran(record: Mapping[str, Any]) -> Event:
    outcome = record.get("outcome") if record["status"] == "finished" else None  # of one that goes on, it is an old one
    what = record["status"] if outcome is None else _OUTCOMES[outcome["production"]]
    model = record["stages"].get("merge", {}).get("key", "")
    why = "; ".join(outcome["reasons"]) if outcome else record.get("reason", "")
    by = (outcome or {}).get("by", "")
    return Event(record["written"], what, model, record["run"], by, why, _scored(record))


_OUTCOMES = {
    "moved": "promoted",
    "stands": "stands",
    "elsewhere": "not compared",
    "stood": "stood before",
    "waits": "waits for a yes",
    "refused": "declined",
    "untouched": "gate failed",
}


def _scored(record: Mapping[str, Any] | None) -> Mapping[str, Json]:
    return (record or {}).get("scores") or {}
