"""Scheduled retraining: look at the sources and, when there is something new, run the recipe to its end.

Nothing new: nothing runs, and the run's state says so. Two retrainings of one name never run at once: a lease on the
name in the store holds over deployments, machines and servers, and a run that lost it starts no further stage. Of the
runs of a schedule that came due while nobody worked, one does the work and the others are marked as caught up.
"""

from collections.abc import Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import FlowRun, State, filters
from prefect.client.schemas.objects import StateType
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed

from flows.dashboard import Dashboard
from flows.execute import StageFailed
from flows.finetune import failed, finished, label, opened, own_id, require_held, run_name, work
from flows.parameters import OwnRuntime, filled
from flows.plan import make_plan
from flows.settle import settle_found
from flows.stored import AnyRecipe, recipe_of
from stages.child import Suspended
from stages.errors import UserError
from stages.lease import Lease, lease
from stages.runtime import Runtime, store_of


@flow(name="retrain", flow_run_name=run_name, persist_result=False)
def retrain(recipe: AnyRecipe, settings: Sequence[str] = (), runtime: OwnRuntime = None) -> State[Any]:
    """Train again on what is new: fetch only that, compare with the base model and production, promote or not.

    Raises UserError, StageFailed and Suspended.

    Args:
        recipe: A file on the worker's machine, the name of a recipe that ran before, or one written here.
        settings: Recipe keys to override, each an item, such as `train.learning_rate=2e-4`.
        runtime: Where and how fast; else the worker's environment (`REGROW_*`) says so.
    """
    where = filled(runtime)
    try:
        with get_client(sync_client=True) as client:
            store = store_of(where)
            begun = store.read_run(own_id(client))  # one that goes on is of the recipe that it began with
            name = begun["recipe"] if begun else recipe_of(recipe, settings, store).recipe.name
            owner = f"retraining {name}, flow run {flow_run.name}"
            log = get_run_logger()
            with lease(store, "retrain", name, where.lease_seconds, owner, log.info) as held:
                return new(client, recipe, settings, where, held)
    except (UserError, StageFailed, Suspended) as error:
        return failed(error)


def new(
    client: SyncPrefectClient, recipe: AnyRecipe, settings: Sequence[str], runtime: Runtime, held: Lease
) -> State[Any]:
    """Do the run if there is anything to do."""
    looked, goes_on = server_time(client), False
    try:
        run, goes_on = opened(client, recipe, settings, runtime)
    finally:
        if not goes_on:  # else it works on what it saw long ago
            catch_up(client, looked)
    if goes_on or make_plan(run).to_run:
        return work(client, run, held=held)
    require_held(held)
    outcome = settle_found(run)
    if outcome.production == "moved":  # the run that made the model ended before it could
        label(client, run)
        Dashboard(client).show_history(run)
        return finished(run, outcome)
    told = outcome.told(run.name) or f"not published: {'; '.join(outcome.reasons)}"
    message = f"nothing new: every stage of {run.name} is in the store; {told}"
    get_run_logger().info(message)
    return Completed(name="NothingNew", message=message)


def catch_up(client: SyncPrefectClient, looked: datetime) -> None:
    """Mark the runs of this schedule that were due when this one looked at the sources: it does their work."""
    if not deployment.id:
        return
    me = client.read_flow_run(UUID(flow_run.id))
    due = client.read_flow_runs(
        flow_run_filter=filters.FlowRunFilter(
            deployment_id=filters.FlowRunFilterDeploymentId(any_=[UUID(deployment.id)]),
            state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=filters.FlowRunFilterExpectedStartTime(before_=looked),
        )
    )
    for other in done_by(me, due):
        caught: State[None] = Cancelled(name="CaughtUp", message=f"{me.name} does its work")
        client.set_flow_run_state(other.id, caught, force=True)


def server_time(client: SyncPrefectClient) -> datetime:
    """The time by the clock that says which runs are due: this machine's may be wrong, and what is due in a year is not
    done by this run."""
    return parsedate_to_datetime(client.hello().headers["Date"])


def done_by(me: FlowRun, due: Sequence[FlowRun]) -> list[FlowRun]:
    """Of the runs that are due, those whose work this one does: the schedule's, with its parameters, that never began.

    One that did is due again because it goes on: a person may have said yes to what it made.
    """
    same = [run for run in due if run.id != me.id and run.parameters == me.parameters]
    return [run for run in same if run.auto_scheduled and run.run_count == 0]
