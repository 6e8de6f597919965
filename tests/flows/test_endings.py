"""How a run that did not come to its end is kept on record: what stopped it is told apart, with the reason."""

import json
import threading
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from prefect.exceptions import Pause
from rich.console import Console

from flows.execute import Follower, StageFailed, following
from flows.history import events_of
from flows.run import Run
from flows.server import Api, reporting_to
from flows.show import show_what
from stages.build import Built
from stages.child import Suspended
from stages.runtime import Runtime
from stages.store import open_store
from tests.flows.conftest import Tiny
from tests.flows.raised import eventually
from tests.flows.rehearsal import Rehearsal


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (
            Suspended("stopped at its last save: the lease on this stage was lost"),
            "suspended",
            "stopped at its last save",
        ),
        (Pause(), "suspended", "suspended in the dashboard"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (StageFailed("fetch failed: no [more] memory\n    the log"), "failed", "fetch failed: no [more] memory"),
    ],
)
def test_what_stopped_a_run_is_on_record(
    error: BaseException, status: str, reason: str, make_tiny: Callable[[], Tiny]
) -> None:
    tiny = make_tiny()

    def stop(run: Run, stage: str) -> None:
        raise error

    with following(Follower(started=stop)), pytest.raises(type(error)):
        tiny.run("+fetch")
    store = open_store(tiny.runtime.store, tiny.runtime.cache)
    [event] = events_of(store, "tiny")
    assert event.what == status and event.why.startswith(reason) and "\n" not in event.why
    console = Console(file=StringIO(), width=80)
    with console.capture() as told:
        show_what(store, event.run, console, False)
    assert f"of tiny: {status} on " in told.get() and reason in told.get()


@pytest.mark.parametrize("last", [pytest.param("evaluate", marks=pytest.mark.full), "publish"])
def test_a_retraining_whose_name_another_took_over_goes_no_further(last: str, tmp_path: Path, prefect_api: Api) -> None:
    from flows.retrain import retrain

    rehearsal = Rehearsal(tmp_path, name="taken")
    told = rehearsal.ready(20)
    lock = "locks/retrain/taken.json"

    def take_over(run: Run, stage: str, built: Built) -> None:
        if stage != last:
            return
        found = rehearsal.store.objects.read(lock)
        assert found is not None
        theirs = {**json.loads(found.data), "owner": "another machine", "token": "theirs", "process": []}
        rehearsal.store.objects.put(lock, json.dumps(theirs).encode())
        eventually(
            lambda: {thread.name for thread in threading.enumerate()}, lambda names: "lease retrain" not in names
        )

    with reporting_to(prefect_api), following(Follower(finished=take_over)):
        runtime = Runtime(**told["runtime"], lease_seconds=15.0)
        state = retrain(told["recipe"], runtime=runtime, return_state=True)
    assert state.name == "Suspended" and "another run took it over" in str(state.message)
    assert rehearsal.stands == "" and not (tmp_path / "out").exists()
    assert any(stage == "publish" for stage, _, _ in rehearsal.store.manifests()) == (last == "publish")
    [event] = events_of(rehearsal.store, "taken")
    assert event.what == "suspended" and "another run took it over" in event.why


def test_a_run_that_is_refused_before_its_first_stage_is_on_record(tmp_path: Path, prefect_api: Api) -> None:
    from flows.finetune import finetune

    rehearsal = Rehearsal(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs.txt").write_text("what a model must not replace")
    run = rehearsal.start(20)
    run.record("started")
    with reporting_to(prefect_api):
        state = finetune(run.loaded.recipe, runtime=run.runtime, run=run.id, return_state=True)
    assert state.is_failed() and "theirs.txt" in str(state.message)
    [event] = events_of(rehearsal.store, "bot")
    assert event.what == "failed" and "theirs.txt" in event.why
