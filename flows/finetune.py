"""The flow: every stage of a recipe in order, each a task that finds its artifact or makes it.

Our store is the only cache: a stage found there returns the state `Cached` with who made it and when. Tasks are called
directly, not submitted: a cancel or a Ctrl-C is raised in the main thread, where it ends the stage's processes; a
submitted task would run on to its end first.
"""

from collections.abc import Collection, Sequence
from typing import Any, TypedDict

import yaml
from prefect import Task, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.dashboard import Dashboard
from flows.execute import StageFailed, execute, following
from flows.graph import select as selected
from flows.plan import Plan, make_plan
from flows.recipe import Loaded, Recipe, check
from flows.run import Run, start
from flows.screen import headline, seconds
from flows.settle import Outcome, settle
from flows.strict_yaml import Document
from stages import evaluate
from stages.build import Built
from stages.child import Suspended
from stages.errors import UserError
from stages.runtime import Runtime, from_environment
from stages.store import open_store


class Reference(TypedDict):
    """What passes between tasks: an artifact's name, never its bytes."""

    stage: str
    key: str
    digest: str


def run_name() -> str:
    """The recipe's name and a short id: the run's own, when it was started with one."""
    given: str = flow_run.parameters.get("run") or flow_run.id or ""
    return f"{flow_run.parameters['recipe'].name}-{given[-6:]}"


@flow(name="finetune", flow_run_name=run_name, persist_result=False)
def finetune(
    recipe: Recipe,
    runtime: Runtime | None = None,
    select: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: Sequence[str] = (),
    strict: bool = False,
    run: str = "",
) -> State[Any]:
    """Fine-tune a model by a recipe: make what is not in the store yet.

    `runtime`: where and how fast, by default from the environment (`REGROW_*`). `select`, `exclude`, `force`: stages,
    such as `train+`. `strict`: make again what other code or library versions made. `run`: an earlier run's id, to use
    its sources as they were found then. Raises UserError, StageFailed and Suspended.
    """
    try:
        this = opened(recipe, runtime or from_environment(), run)
        plan = make_plan(this, select, exclude, force, strict)
        again = {*(selected(force) if force else ()), *(s.stage for s in plan.steps if strict and s.drift)}
        with get_client(sync_client=True) as client:
            label(client, this)
            outcome = drive(this, plan, again, Dashboard(client))
    except (UserError, StageFailed, Suspended) as error:
        return failed(error)
    return finished(this, outcome)


def opened(recipe: Recipe, runtime: Runtime, run: str = "") -> Run:
    """A new run with its sources resolved now, or an earlier one with the sources as they were."""
    store = open_store(runtime.store, runtime.cache, runtime.storage_options)
    record = store.read_run(run) if run else None
    if run and record is None:
        raise UserError(f"run `{run}`: there is no such run in {store.url}; see `regrow show`")
    if record is None:
        check(recipe.model_dump(mode="json"), Document({}, {}), "recipe")
    text = record["text"] if record else yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True))
    loaded = Loaded(recipe=recipe, text=text, path=record["path"] if record else "")
    return start(loaded, runtime, store, record)


def label(client: SyncPrefectClient, run: Run) -> None:
    """Tag the flow run with its recipe, model and method, beside the tags it already has."""
    recipe = run.loaded.recipe
    source = recipe.fetch.model
    model = source.hub or source.package or str(source.path or source.url).rstrip("/").rpartition("/")[2]
    found = [f"recipe:{recipe.name}", f"model:{model}", f"method:{recipe.train.method}"]
    client.update_flow_run(flow_run.id, tags=sorted({*flow_run.tags, *found}))


def drive(run: Run, plan: Plan, again: Collection[str], dashboard: Dashboard) -> Outcome | None:
    """Execute the plan's steps in order, deliver what was published, keep the run's record.

    The stages in `again` are made although they are in the store.
    """
    if "evaluate" in plan.to_run:
        evaluate.check(run.loaded.recipe.evaluate)  # an unknown task is told before anything is trained
    dashboard.show_plan(plan)
    run.record("running")
    states: dict[str, State[Reference]] = {}
    try:
        with following(dashboard.follower()):
            for step in plan.steps:
                if step.state != "skipped":
                    reads = [states[s] for s in run.upstream(step.stage) if s in states]
                    make = stage_task(run, step.stage, step.stage in again)
                    states[step.stage] = make(reads, return_state=True)
                    states[step.stage].result()
        outcome = settle(run) if "publish" in states else None
    except BaseException:
        run.record("failed")
        raise
    run.record("finished")
    run.become_baseline()
    return outcome


def stage_task(run: Run, stage: str, force: bool) -> Task[[list[Any]], Any]:
    """The task of one stage. What it `reads` draws the dashboard's graph; the artifacts themselves are in the run."""

    @task(name=stage, task_run_name=stage, cache_policy=NO_CACHE, persist_result=False)
    def make(reads: list[Reference]) -> State[Any]:
        try:
            built = execute(run, stage, force=force)
        except (UserError, StageFailed, Suspended) as error:
            return failed(error)
        made = Reference(stage=stage, key=built.artifact.key, digest=built.artifact.digest)
        return Completed(name="Cached" if built.hit else None, message=_told(stage, built), data=made)

    return make


def _told(stage: str, built: Built) -> str:
    """The message of a finished stage's state."""
    name, facts = f"{stage} {built.artifact.key[:8]}", headline(stage, built.artifact.facts)
    by = built.artifact.provenance
    told = f"made by run {by.get('run') or '?'} on {by.get('finished', '?')}" if built.hit else seconds(built.seconds)
    return f"{name}: {told}" + (f"; {facts}" if facts else "")


def failed(error: Exception) -> State[Any]:
    """The state of an error that was foreseen: its first line; whoever asks for the result gets the error itself."""
    name = "Suspended" if isinstance(error, Suspended) else None
    return Failed(name=name, message=str(error).partition("\n")[0], data=error)


def finished(run: Run, outcome: Outcome | None) -> State[Any]:
    """The flow's last state: a gate that was not passed is a result, with a name that automations can wait for."""
    if outcome is None:
        return Completed()
    if not outcome.passed:
        return Completed(name="GateFailed", message=f"not published: {'; '.join(outcome.reasons)}")
    told = [f"published to {outcome.to}"] if outcome.to else []
    told += [outcome.told(run.name)]
    return Completed(message="; ".join([*told, *outcome.reasons]))
