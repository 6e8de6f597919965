"""How a run that did not come to its end is kept on record: what stopped it is told apart, with the reason."""

from collections.abc import Callable
from io import StringIO

import pytest
from prefect.exceptions import Pause
from rich.console import Console

from flows.execute import Follower, StageFailed, following
from flows.history import events_of
from flows.run import Run
from flows.show import show_what
from stages.child import Suspended
from stages.store import open_store
from tests.flows.conftest import Tiny


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
