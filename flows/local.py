"""Runs a plan from the command line: the Prefect flow in this process, followed on the terminal, then the summary.

Only a plan with something to run starts Prefect.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.execute import following
from flows.graph import select
from flows.plan import Plan, make_plan
from flows.run import Run
from flows.screen import Screen
from flows.settle import Outcome, settle, settle_found
from stages.compare import OVER_PRODUCTION, PRODUCTION, UNBOUNDED
from stages.identity import Json

EXIT_GATE = 4

COLUMNS, LABEL = 80, 16
"""Of the terminal, and those that a task's name gets in any case."""


@dataclass(frozen=True)
class Selection:
    """Which stages, as the command line said it."""

    selectors: Sequence[str] = ()
    exclude: Sequence[str] = ()
    force: Sequence[str] = ()
    strict: bool = False


def run_plan(run: Run, selection: Selection, console: Console) -> str:
    """Run the plan's flow; return the line that tells how to see it again. Raises what a stage raises."""
    from flows.server import serving

    run.record("started")
    screen = Screen(console)
    with ExitStack() as stack:
        try:
            api = stack.enter_context(serving())
        except BaseException as error:  # what ends the flow is recorded there
            run.record_end(error)
            raise
        console.print(f"[dim]dashboard: {api.url.removesuffix('/api')}[/]")
        with following(screen.follower()):
            try:
                state = _flow(run, selection)
                state.result()
            finally:
                screen.stop()
        return api.where(str(state.state_details.flow_run_id))


def _flow(run: Run, selection: Selection) -> Any:
    """Run a single stage as its own small flow, everything else as `finetune`; return the final state."""
    # Prefect reads its settings when it is imported, so not before there is a server.
    from flows.finetune import finetune
    from flows.stage import stage

    recipe, runtime = run.loaded.recipe, run.runtime
    chosen, forced = select(selection.selectors, selection.exclude), list(selection.force)
    if len(chosen) == 1 and not selection.strict:
        again = bool(forced) and chosen[0] in select(forced)
        return stage(chosen[0], recipe, force=again, runtime=runtime, run=run.id, return_state=True)
    return finetune(
        recipe,
        select=list(selection.selectors),
        exclude=list(selection.exclude),
        force=forced,
        strict=selection.strict,
        runtime=runtime,
        run=run.id,
        return_state=True,
    )


def finish(run: Run, selection: Selection, dashboard: str, console: Console, as_json: bool) -> int:
    """Look at the destination and refs, print the summary, return the exit code."""
    plan = make_plan(run, selection.selectors, selection.exclude)
    publishes = plan.step("publish").state == "cached"
    look = settle if dashboard else settle_found  # a flow has recorded how the run ended
    outcome = look(run) if publishes and not run.runtime.read_only else None
    if as_json:
        console.print_json(json.dumps(_summary(run, plan, outcome, dashboard)))
    else:
        _print_summary(run, outcome, dashboard, console)
    return EXIT_GATE if outcome and not outcome.passed else 0


def _summary(run: Run, plan: Plan, outcome: Outcome | None, dashboard: str) -> dict[str, Json]:
    stages = {s.stage: {"state": s.state, "key": s.key} for s in plan.steps}
    scores = run.artifacts["publish"].facts["scores"] if outcome else None
    return {
        "run": run.id if dashboard else None,
        "stages": stages,
        "scores": scores,
        "outcome": outcome.__dict__ if outcome else None,
        "dashboard": dashboard,
    }


def _print_summary(run: Run, outcome: Outcome | None, dashboard: str, console: Console) -> None:
    if outcome is not None:
        console.print()
        console.print(_scores(run.artifacts["publish"].facts["scores"]))
        _print_outcome(run, outcome, console)
    if dashboard:
        console.print(f"dashboard  {escape(dashboard)}", soft_wrap=True)
    else:
        console.print("nothing to do" if outcome is None or not outcome.arrived else "nothing to make; delivered again")


def _scores(scores: Json) -> Table:
    """Base against tuned, and production against tuned; with 95 % intervals, 80 columns wide at most."""
    rows: list[list[str]] = []
    for task, told in scores["tasks"].items():
        if UNBOUNDED in told:
            rows += _rows(f"{task}, reward of {told['n']}", told, 1, 2)
        else:
            rows += _rows(f"{task} % of {told['n']}", told, 100, 1)
    if loss := scores["heldout_loss"]:
        rows += _rows("held-out loss", loss, 1, 2)
    widths = [max(len(name), *(len(row[place]) for row in rows), 0) for place, name in enumerate(_MODELS, 1)]
    table = Table(box=None, pad_edge=False, header_style="dim")
    # A long label is cut, and no figure; two columns of white space stand before each of these.
    room = max(LABEL, COLUMNS - sum(width + 2 for width in widths))
    table.add_column("95 % intervals", overflow="ellipsis", no_wrap=True, max_width=room)
    for name in _MODELS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))  # `[too few]` would be taken for a style
    return table


def _rows(label: str, told: Json, scale: float, digits: int) -> Iterator[list[str]]:
    yield [label, *(_interval(told[m], scale, digits) for m in _MODELS)]
    if PRODUCTION in told:
        over = told[OVER_PRODUCTION]["difference"]
        yield ["  in production", _interval(told[PRODUCTION], scale, digits), "", _interval(over, scale, digits)]


_MODELS = ("base", "tuned", "difference")


def _interval(value: Json, scale: float, digits: int) -> str:
    middle, low, high = (f"{scale * value[end]:.{digits}f}" for end in ("value", "low", "high"))
    return f"{middle} [too few]" if value.get("too_few") else f"{middle} [{low}, {high}]"


def _print_outcome(run: Run, outcome: Outcome, console: Console) -> None:
    mark = "[green]passed[/]" if outcome.passed else "[red]not passed[/]"
    console.print(f"gate       {mark}: {escape('; '.join(outcome.reasons))}")
    if outcome.to:
        console.print(f"model      {escape(_shown(outcome.to))}", soft_wrap=True)
        console.print(f"report     {escape(_shown(outcome.to))}/README.md", soft_wrap=True)
    if told := outcome.told(run.name):
        console.print(f"ref        {told}")


def _shown(place: str) -> str:
    """A folder as seen from where the command runs, if it is below that."""
    below = "://" not in place and Path(place).is_relative_to(Path.cwd())
    return str(Path(place).relative_to(Path.cwd())) if below else place
