"""One stage as a flow of its own, so that it can have a page, a schedule and a deployment of its own.

What the stage reads must have been made; the error names the selector that makes it too.
"""

from typing import Literal

from prefect import flow
from prefect.client.schemas import State
from prefect.runtime import flow_run

from flows.finetune import finetune
from flows.recipe import Recipe
from stages.runtime import Runtime

StageName = Literal["fetch", "convert", "tokenize", "pack", "score", "train", "merge", "evaluate", "publish"]
"""`flows.graph.ORDER` as a type: the choices in the dashboard's form."""


def run_name() -> str:
    """The stage and the recipe's name."""
    return f"{flow_run.parameters['stage']} of {flow_run.parameters['recipe'].name}"


@flow(name="stage", flow_run_name=run_name, persist_result=False)
def stage(
    stage: StageName, recipe: Recipe, runtime: Runtime | None = None, force: bool = False, run: str = ""
) -> State[None]:
    """Make one stage of a recipe, again with `force`; with `run`, of the sources as that run found them.

    Raises UserError and StageFailed.
    """
    return finetune.fn(recipe, runtime, select=[stage], force=[stage] if force else [], run=run)
