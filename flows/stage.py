"""One stage as a flow of its own, so that it can have a page, a schedule and a deployment of its own.

What the stage reads must have been made; the error names the selector that makes it too.
"""

from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.runtime import flow_run

from flows.finetune import finetune, recipe_name
from flows.parameters import StageName
from flows.stored import AnyRecipe
from stages.runtime import Runtime


def run_name() -> str:
    """The stage and the recipe's name."""
    return f"{flow_run.parameters['stage']} of {recipe_name(flow_run.parameters['recipe'])}"


@flow(name="stage", flow_run_name=run_name, persist_result=False)
def stage(
    stage: StageName,
    recipe: AnyRecipe,
    settings: Sequence[str] = (),
    force: bool = False,
    runtime: Runtime | None = None,
    run: str = "",
) -> State[Any]:
    """Make one stage of a recipe, and nothing else. Raises UserError and StageFailed.

    Args:
        stage: what is made; what it reads must be there already.
        recipe: a file on the worker's machine, the name of a recipe that ran before, or one written here.
        settings: recipe keys to override, one a line, such as `train.learning_rate=2e-4`.
        force: make it again although it is in the store.
        runtime: where and how fast; empty takes the worker's environment (`REGROW_*`).
        run: an earlier run's id, to use its recipe and its sources as they were then.
    """
    return finetune.fn(recipe, settings, select=[stage], force=[stage] if force else [], runtime=runtime, run=run)
