"""One stage as a flow of its own, so that it can have a page, a schedule and a deployment of its own.

What the stage reads must have been made; the error names the selector that makes it too.
"""

from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.runtime import flow_run

from flows.finetune import finetune, recipe_name
from flows.parameters import OwnRuntime, StageName
from flows.stored import AnyRecipe


def run_name() -> str:
    """The stage and the recipe's name."""
    return f"{flow_run.parameters['stage']} of {recipe_name(flow_run.parameters['recipe'])}"


@flow(name="stage", flow_run_name=run_name, persist_result=False)
def stage(
    stage: StageName,
    recipe: AnyRecipe,
    settings: Sequence[str] = (),
    force: bool = False,
    runtime: OwnRuntime = None,
    run: str = "",
) -> State[Any]:
    """Make one stage of a recipe, and nothing else. Raises UserError and StageFailed.

    Args:
        stage: What is made; what it reads must be there already.
        recipe: A file on the worker's machine, the name of a recipe that ran before, or one written here.
        settings: Recipe keys to override, each an item, such as `train.learning_rate=2e-4`.
        force: Make it again although it is in the store.
        runtime: Where and how fast; else the worker's environment (`REGROW_*`) says so.
        run: An earlier run's id, to use its recipe and its sources as they were then.
    """
    return finetune.fn(recipe, settings, select=[stage], force=[stage] if force else [], runtime=runtime, run=run)
