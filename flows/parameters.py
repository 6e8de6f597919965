"""The parameters that flows share, as types: the dashboard's form takes choices and patterns from them.

What each parameter is for stands in the `Args:` of the flows' docstrings, where Prefect looks for it.
"""

from typing import Annotated, Literal

from pydantic import Field

from stages.runtime import Runtime, from_environment

StageName = Literal["fetch", "convert", "tokenize", "pack", "score", "train", "merge", "evaluate", "publish"]
"""`flows.graph.ORDER` as a type: the choices in the dashboard's form."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""A recipe's name."""

OwnRuntime = Runtime | Annotated[None, Field(title="As the worker has it")]
"""A run's own runtime; the title is what the form calls none."""


def filled(runtime: Runtime | None) -> Runtime:
    """A run's own runtime; what it leaves out is as the worker's environment (`REGROW_*`) says."""
    return from_environment(runtime.model_dump(exclude_unset=True) if runtime else {})


Days = Annotated[float, Field(ge=0)]
