"""Asking a person before production moves: the run is suspended with a form that shows the scores.

Nothing waits in memory: the process ends, the GPU is free. When the form is filled in, the flow starts again from the
run's record, so what is promoted is what was shown, whatever data came in meanwhile.
"""

from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from flows.pages import scores_page
from flows.run import Run
from flows.settle import Answer

DAYS = 7
"""A form that nobody filled in for so long ends its run as failed."""


class Approval(RunInput):
    """The form."""

    promote: bool = Field(default=False, title="Promote this model", description="Off: production stays as it is.")
    why: str = Field(default="", title="Why", description="Kept in the name's history.")
    by: str = Field(default="", title="Your name", description="Kept in the name's history.")


def asked(run: Run) -> Answer:
    """What the person said of exactly these weights; the first call suspends the flow run and does not return."""
    form = Approval.with_initial_data(description=question(run))
    key = f"approval-{run.artifacts['merge'].digest[:16]}"
    given = suspend_flow_run(wait_for_input=form, timeout=DAYS * 24 * 3600, key=key)
    return Answer(given.promote, given.why, given.by or "somebody in the dashboard")


def question(run: Run) -> str:
    """What the form shows: the model, why the gate passed, the scores."""
    facts = run.artifacts["publish"].facts
    scores = scores_page(facts["scores"], brief=True)
    weights, reasons = run.artifacts["merge"].key[:8], "; ".join(facts["reasons"])
    return (
        f"## Promote {run.name}?\n\nResume with the switch below on for yes, off for no.\n\n"
        f"Run `{run.id}`, weights `{weights}`. It passed the gate: {reasons}.\n\n{scores}\n"
    )
