"""The flow: every stage of a recipe in order, each a task that finds its artifact or makes it.

Our store is the only cache: a stage found there returns the state `Cached` with who made it and when. Tasks are called
directly, not submitted: a cancel or a Ctrl-C is raised in the main thread, where it ends the stage's processes; a
submitted task would run on to its end first.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import Any, TypedDict
from uuid import UUID

from prefect import Task, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import State
from prefect.events import emit_event
from prefect.exceptions import Pause, TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed

from flows.approval import asked
from flows.dashboard import Dashboard
from flows.execute import StageFailed, execute, following
from flows.graph import select as selected
from flows.parameters import OwnRuntime, filled
from flows.plan import Plan, Step, drifted, make_plan, require_writable
from flows.recipe import Recipe
from flows.run import Run, start
from flows.screen import headline, seconds
from flows.settle import Outcome, settle
from flows.stored import AnyRecipe, recipe_of, recorded
from stages import evaluate
from stages.build import Built
from stages.child import ON_SIGTERM, Suspended
from stages.deliver import refuse_taken
from stages.errors import UserError
from stages.lease import Lease
from stages.runtime import Runtime, store_of
from stages.store import Store


class Reference(TypedDict):
    """What passes between tasks: an artifact's name, never its bytes."""

    stage: str
    key: str
    digest: str


def run_name() -> str:
    """The recipe's name and a short id: the run's own, when it was started with one."""
    given: str = flow_run.parameters.get("run") or flow_run.id or ""
    return f"{recipe_name(flow_run.parameters['recipe'])}-{given[-6:]}"


def recipe_name(recipe: str | Recipe) -> str:
    """What a run of the recipe is called before it is read: a file by its stem."""
    return recipe.name if isinstance(recipe, Recipe) else PurePath(recipe).stem


@flow(name="finetune", flow_run_name=run_name, persist_result=False)
def finetune(
    recipe: AnyRecipe,
    settings: Sequence[str] = (),
    select: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: Sequence[str] = (),
    strict: bool = False,
    runtime: OwnRuntime = None,
    run: str = "",
) -> State[Any]:
    """Fine-tune a model by a recipe: make what is not in the store yet. Raises UserError, StageFailed and Suspended.

    Args:
        recipe: A file on the worker's machine, the name of a recipe that ran before, or one written here.
        settings: Recipe keys to override, each an item, such as `train.learning_rate=2e-4`.
        select: Stages, such as `train`, `train+` (and all below), `+evaluate` (and all above); empty takes all.
        exclude: Stages to leave out; the same grammar.
        force: Stages to make again although they are in the store.
        strict: Make again what other code or library versions made.
        runtime: Where and how fast; else the worker's environment (`REGROW_*`) says so.
        run: An earlier run's id, to use its recipe and its sources as they were then.
    """
    try:
        with get_client(sync_client=True) as client:
            this, earlier = opened(client, recipe, settings, filled(runtime), run)
            return work(client, this, select, exclude, force, strict, resumed=earlier and not run)
    except (UserError, StageFailed, Suspended) as error:
        return failed(error)


def opened(
    client: SyncPrefectClient, recipe: str | Recipe, settings: Sequence[str], runtime: Runtime, run: str = ""
) -> tuple[Run, bool]:
    """A new run with its sources resolved now, or an earlier one with the sources as they were: the one called `run`,
    or what this flow run began before it was suspended or retried. Whether it is an earlier one comes second."""
    store = store_of(runtime)
    wanted = run or own_id(client)
    record = store.read_run(wanted)
    if run and record is None:
        raise UserError(f"run `{run}`: there is no such run in {store.url}; see `regrow show`")
    if run and record is not None:
        _refuse_others(run, record["recipe"], recipe, settings, store)
    if record is not None:
        return start(recorded(record), runtime, store, record), True
    loaded = recipe_of(recipe, settings, store)
    if loaded.run:
        beside = f", with {' '.join(loaded.settings)}" if loaded.settings else ""
        get_run_logger().info(f"the recipe {loaded.recipe.name} is that of run {loaded.run}{beside}")
    return start(loaded, runtime, store, run_id=wanted), False


def _refuse_others(run: str, name: str, recipe: str | Recipe, settings: Sequence[str], store: Store) -> None:
    """Raise UserError for a recipe or settings that are not those of the earlier run: it would take none of them."""
    if settings:
        raise UserError(f"run `{run}` is done as it was asked for then: take `run` out to use `settings`")
    if recipe == name:
        return
    asked = recipe.name if isinstance(recipe, Recipe) else recipe_of(recipe, (), store).recipe.name
    if asked != name:
        raise UserError(f"run `{run}` is of the recipe `{name}`, not of `{asked}`: name that one, or take `run` out")


def own_id(client: SyncPrefectClient) -> str:
    """The id of the run that this flow run does: the same each time the flow run goes on."""
    created = client.read_flow_run(UUID(flow_run.id)).created
    assert created is not None
    return f"{created:%Y%m%d-%H%M%S}-{flow_run.id[-6:]}"


def work(
    client: SyncPrefectClient,
    run: Run,
    select: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: Sequence[str] = (),
    strict: bool = False,
    resumed: bool = False,
    held: Lease | None = None,
) -> State[Any]:
    """Plan and drive a run, ask a person where the recipe wants it, and say how it ended.

    A run that is `resumed` does not make again what it has made again already. It stops as Suspended where a lease that
    it works under, `held`, was lost.
    """
    plan = make_plan(run, select, exclude, force, strict)
    require_writable(run, plan)
    again = {*(selected(force) if force else ()), *(s.stage for s in plan.steps if strict and s.drift)}
    label(client, run)
    dashboard = Dashboard(client)
    outcome = drive(run, plan, again, dashboard, resumed, held, strict)
    if outcome is None:
        return Completed()
    if outcome.production == "waits" and deployment.id:
        answer = asked(run)
        require_held(held)
        outcome = settle(run, answer)
        run.record("finished", asdict(outcome))
    state = finished(run, outcome)
    dashboard.show_history(run)
    return state


def label(client: SyncPrefectClient, run: Run) -> None:
    """Name the flow run, and tag it with its recipe, model and method, beside the tags it already has."""
    recipe = run.loaded.recipe
    source = recipe.fetch.model
    model = source.hub or source.package or str(source.path or source.url).rstrip("/").rpartition("/")[2]
    found = [f"recipe:{recipe.name}", f"model:{model}", f"method:{recipe.train.method}"]
    stored = isinstance(flow_run.parameters["recipe"], str)  # named after its file until it was read
    name = f"{recipe.name}-{run.id[-6:]}" if stored and "stage" not in flow_run.parameters else None
    client.update_flow_run(flow_run.id, name=name, tags=sorted({*flow_run.tags, *found}))


def require_held(held: Lease | None) -> None:
    """Raise Suspended when a lease was lost: whoever waited for it may be at the same work by now."""
    if held is not None and held.lost.is_set():
        raise Suspended(f"stopped before it went on: the lease on its name was lost, {held.why}")


def drive(
    run: Run,
    plan: Plan,
    again: Collection[str],
    dashboard: Dashboard,
    resumed: bool = False,
    held: Lease | None = None,
    strict: bool = False,
) -> Outcome | None:
    """Execute the plan's steps in order, deliver what was published, keep the run's record.

    The stages in `again` are made although they are in the store, and where it is `strict` those that the plan could
    not know yet and that other code made; where the run is `resumed`, unless it made them.
    """
    states: dict[str, State[Reference]] = {}
    try:
        if "evaluate" in plan.to_run:
            evaluate.check(run.loaded.recipe.evaluate)  # an unknown task is told before anything is trained
        if {"train", "publish"} <= {*plan.to_run}:
            refuse_taken(run.to, run.name)
        dashboard.show_plan(plan)
        run.record("running")
        with following(dashboard.follower()):
            for step in plan.steps:
                if step.state != "skipped":
                    require_held(held)
                    reads = [states[s] for s in run.upstream(step.stage) if s in states]
                    make = stage_task(run, step, step.stage in again, resumed, strict)
                    states[step.stage] = make(reads, return_state=True)
                    states[step.stage].result()
                    if step.stage in run.made:  # a training of days outlives the grace in which gc leaves it alone
                        run.record("running")
                    if step.stage == "fetch":  # what only a fetched model tells is told before anything is trained
                        for section in (s for s in plan.to_run if s in ("train", "evaluate")):
                            run.refuse_steps(section)
                        if {"train", "evaluate"} <= {*plan.to_run}:
                            run.check_tasks()
                        if "train" in plan.to_run:
                            run.check_names()
                            run.check_head()
                    if step.stage == "convert" and "train" in plan.to_run:
                        run.check_kind()
        require_held(held)
        outcome = settle(run) if "publish" in states else None
    except TerminationSignal as signal:  # between two stages
        stopped = Suspended(ON_SIGTERM)
        run.record_end(stopped)
        raise stopped from signal
    except BaseException as error:
        run.record_end(Suspended("suspended in the dashboard") if isinstance(error, Pause) else error)
        raise
    run.record("finished", asdict(outcome) if outcome else None)
    run.become_baseline()
    return outcome


def stage_task(
    run: Run, step: Step, force: bool, resumed: bool = False, strict: bool = False
) -> Task[[list[Any]], Any]:
    """The task of one step. What it `reads` draws the dashboard's graph; the artifacts themselves are in the run."""

    stage = step.stage

    @task(name=stage, task_run_name=stage, cache_policy=NO_CACHE, persist_result=False)
    def make(reads: list[Reference]) -> State[Any]:
        try:
            forced = (force or (strict and drifted(run, stage))) and not (resumed and run.has_made(stage))
            built = execute(run, stage, force=forced, regrow=step.regrows)
        except TerminationSignal:
            return failed(Suspended(ON_SIGTERM))
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


def finished(run: Run, outcome: Outcome) -> State[Any]:
    """The flow's last state, and the event that automations wait for: a gate that was not passed is a result."""
    told = {"run": run.id, "recipe": run.name, "reasons": outcome.reasons, "scores": run.headline_scores()}
    if not outcome.passed:
        announce("regrow.gate.failed", run.name, told)
        return Completed(name="GateFailed", message=f"not published: {'; '.join(outcome.reasons)}")
    if outcome.production == "moved":
        announce("regrow.model.published", run.name, {**told, "model": run.artifacts["merge"].key, "to": outcome.to})
    named = "Waiting" if outcome.production == "waits" else "Refused" if outcome.production == "refused" else None
    words = [f"published to {outcome.to}"] if outcome.to else []
    return Completed(name=named, message="; ".join([*words, outcome.told(run.name), *outcome.reasons]))


def announce(event: str, name: str, told: dict[str, Any]) -> None:
    """An event about a name's model; its resource is `regrow.model.NAME`."""
    emit_event(event, {"prefect.resource.id": f"regrow.model.{name}", "prefect.resource.name": name}, payload=told)
