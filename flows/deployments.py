"""Registers what can be started from the dashboard: pools, queues, the deployments of `deployments/prefect.yaml`, and
the automation that finds runs which died without a word.

`python -m flows.deployments` does so at the configured API (`PREFECT_API_URL`); `regrow up` does it by itself. Doing it
again keeps what people changed in the dashboard: schedules, default parameters and variables of the environment of a
deployment that is there.
"""

import importlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.automations import Automation, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import State, filters
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, StateType
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import Flow
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

QUEUES = {"interactive": 1, "scheduled": 10}
"""Queues of each pool with their priority; 1 comes first."""

SILENT = "regrow: a run that died without a word"
"""The automation's name."""

SILENCE = timedelta(seconds=90)
"""Without a heartbeat for so long (one is due every 30 s) a run counts as crashed."""

ENDS = (
    *("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended", "Cancelling"),
    *("GateFailed", "NothingNew", "Waiting", "Refused", "CaughtUp", "Scheduled", "AwaitingRetry", "Late"),
)
"""States after which no heartbeat is to be expected, ours by the names we give them."""


def listed(here: Path) -> list[dict[str, Any]]:
    """The deployments of `prefect.yaml`; relative paths of recipes will start at `here`."""
    beside = Path(__file__).with_name("prefect.yaml")  # where the wheel has it
    path = beside if beside.exists() else Path(__file__).parents[1] / "deployments" / "prefect.yaml"
    text = path.read_text().replace("{{ $PWD }}", str(here))
    found: list[dict[str, Any]] = yaml.safe_load(text)["deployments"]
    return found


def register(here: Path, devices: int | None = None) -> None:
    """Make pools, queues, automation and deployments, or bring those that are there up to date.

    The pool `gpu` runs one run for each of the `devices`; unless they are given, as many as it does already, or one.
    """
    with get_client(sync_client=True) as client:
        _pool(client, "cpu", None)
        _pool(client, "gpu", None if devices is None else max(1, devices))
        for deployment in listed(here):
            _deployment(client, deployment)
    _watch()


def _pool(client: SyncPrefectClient, name: str, limit: int | None) -> None:
    template = ProcessWorker.get_default_base_job_template()
    first = limit or (1 if name == "gpu" else None)
    try:
        pool = WorkPoolCreate(name=name, type="process", base_job_template=template, concurrency_limit=first)
        client.create_work_pool(pool)
    except ObjectAlreadyExists:
        if limit is not None:
            client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))
    for queue, priority in QUEUES.items():
        with suppress(ObjectAlreadyExists):
            client.create_work_queue(name=queue, work_pool_name=name, priority=priority)


def _deployment(client: SyncPrefectClient, told: Mapping[str, Any]) -> None:
    module, _, function = told["entrypoint"].rpartition(".")
    flow: Flow[..., Any] = getattr(importlib.import_module(module), function)
    pool, limit = told["work_pool"], told.get("concurrency_limit")
    try:
        there = client.read_deployment_by_name(f"{flow.name}/{told['name']}")
    except ObjectNotFound:
        there = None
    variables = dict(pool["job_variables"])
    if there:  # what somebody added, such as a key of the store from a block, is kept
        variables["env"] = {**there.job_variables.get("env", {}), **variables["env"]}
    deployment = RunnerDeployment.from_flow(
        flow,
        name=told["name"],
        description=told["description"],
        tags=told["tags"],
        parameters=there.parameters if there else told.get("parameters", {}),
        schedules=None if there else [_schedule(s) for s in told.get("schedules", [])],
        concurrency_limit=ConcurrencyLimitConfig(**limit) if limit else None,
        work_pool_name=pool["name"],
        work_queue_name=pool["work_queue_name"],
        job_variables=variables,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    deployment.apply()


def _schedule(told: Mapping[str, Any]) -> DeploymentScheduleCreate:
    zone = told["timezone"]
    when: CronSchedule | IntervalSchedule = (
        CronSchedule(cron=told["cron"], timezone=zone)
        if "cron" in told
        else IntervalSchedule(interval=timedelta(seconds=told["interval"]), timezone=zone)
    )
    return DeploymentScheduleCreate(
        schedule=when, active=told["active"], slug=told["slug"], parameters=told.get("parameters", {})
    )


def mark_lost(alive: Collection[int]) -> None:
    """Mark runs as crashed whose process on this machine is none of those `alive`: what ended with the server, by
    `regrow down` or a power cut, could not say so itself, and would hold its place in the pool for ever."""
    under_way = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_run_filter=filters.FlowRunFilter(
                state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=under_way))
            )
        )
        for run in found:
            number = run.infrastructure_pid or ""
            if number.isdigit() and int(number) not in alive:
                lost: State[None] = Crashed(message="its process ended with the server's; the next run resumes it")
                client.set_flow_run_state(run.id, lost, force=True)


def _watch() -> None:
    """A run that was killed together with its worker says nothing more: have the server notice."""
    beat = "prefect.flow-run.heartbeat"
    trigger = EventTrigger(
        after={beat},
        expect={beat, *(f"prefect.flow-run.{state}" for state in ENDS)},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    crash = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message="it gave no sign of life for 90 s")
    automation = Automation(name=SILENT, trigger=trigger, actions=[crash])
    try:
        there = Automation.read(name=SILENT)
    except ValueError:
        automation.create()
        return
    automation.id = there.id  # type: ignore[attr-defined]  # typed as if it were always a coroutine
    automation.update()


if __name__ == "__main__":
    register(Path.cwd())
