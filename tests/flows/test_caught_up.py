"""Which runs of a schedule another one of it does the work of."""

from typing import Any
from uuid import uuid4

from prefect.client.schemas import FlowRun

from flows.retrain import done_by


def run(parameters: dict[str, Any] | None = None, scheduled: bool = True, started: int = 0) -> FlowRun:
    return FlowRun(
        flow_id=uuid4(), parameters=parameters or {"recipe": "bot"}, auto_scheduled=scheduled, run_count=started
    )


def test_one_run_does_the_work_of_all_that_came_due_meanwhile() -> None:
    me, others = run(started=1), [run(), run()]
    assert done_by(me, [me, *others]) == others


def test_a_run_of_another_recipe_or_sent_by_a_person_is_left_alone() -> None:
    assert done_by(run(started=1), [run({"recipe": "other"}), run(scheduled=False)]) == []


def test_a_run_that_a_person_said_yes_to_is_left_alone() -> None:
    """It is due again once it is resumed, with the parameters of its schedule."""
    assert done_by(run(started=1), [run(started=1)]) == []
