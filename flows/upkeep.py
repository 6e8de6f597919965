"""The flows that keep a store in order from the dashboard: promote, rollback and gc."""

from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.states import Completed

from flows import promotion
from flows.dashboard import Dashboard
from flows.finetune import announce, failed
from flows.parameters import Days, Name, OwnRuntime, filled
from stages import gc as garbage
from stages.errors import UserError
from stages.production import Move
from stages.runtime import store_of
from stages.store import BadBlob, Store


@flow(name="promote", flow_run_name="promote {name}", persist_result=False)
def promote(name: Name, what: str = "", anyway: bool = False, runtime: OwnRuntime = None) -> State[Any]:
    """Let a name's production ref name a run's model. Raises UserError and BadBlob.

    Args:
        name: The recipe's name.
        what: A run, or a key of its merge or publish; empty takes the newest run.
        anyway: Promote it although its gate was not passed, or compared it with another model than the one that stands.
        runtime: Where and how fast; else the worker's environment (`REGROW_*`) says so.
    """
    where = filled(runtime)
    try:
        move = promotion.promote(store_of(where), where, name, what or None, anyway)
    except (UserError, BadBlob) as error:
        return failed(error)
    return moved("regrow.model.published", store_of(where), name, move)


@flow(name="rollback", flow_run_name="rollback {name}", persist_result=False)
def rollback(name: Name, runtime: OwnRuntime = None) -> State[Any]:
    """Let a name's production ref name the model that stood there before. Raises UserError and BadBlob.

    Args:
        name: The recipe's name.
        runtime: Where and how fast; else the worker's environment (`REGROW_*`) says so.
    """
    where = filled(runtime)
    try:
        move = promotion.rollback(store_of(where), where, name)
    except (UserError, BadBlob) as error:
        return failed(error)
    return moved("regrow.model.rolled-back", store_of(where), name, move)


def moved(event: str, store: Store, name: str, move: Move) -> State[Any]:
    """Tell that production moved: an event with what a run's event says, the name's history, the flow's state."""
    record = store.read_run(move.run) or {}
    told = {"run": move.run, "recipe": name, "reasons": [move.why], "scores": record.get("scores", {}), "by": move.by}
    announce(event, name, {**told, "model": move.model["key"]})
    with get_client(sync_client=True) as client:
        Dashboard(client).show_history_of(store, name)
    return Completed(message=f"{name}/production now names {move.model['key'][:8]} of run {move.run} ({move.what})")


@flow(name="gc", persist_result=False)
def gc(delete: bool = False, days: Days = 30.0, runtime: OwnRuntime = None) -> State[Any]:
    """Find, and with `delete` remove, artifacts that nothing names any more. Raises UserError.

    Args:
        delete: Really delete; without it only the report is made.
        days: Runs younger than this keep what they used.
        runtime: Where and how fast; else the worker's environment (`REGROW_*`) says so.
    """
    try:
        report = garbage.collect(store_of(filled(runtime)), delete=delete, run_days=days)
    except UserError as error:
        return failed(error)
    count = sum(tally.count for tally in report.freed.values())
    size = sum(tally.size for tally in report.freed.values())
    told = "deleted" if delete else "would go (a dry run: nothing was deleted)"
    return Completed(message=f"{count:,} objects, {size:,} bytes {told}")
