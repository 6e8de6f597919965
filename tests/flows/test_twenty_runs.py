"""Twenty runs at once over one store, reporting to one server under SQLite: none lost, nothing locked."""

import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from flows.server import own_server
from tests.flows.raised import eventually
from tests.flows.rehearsal import Rehearsal

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

NAMES, EACH = 4, 5

RUN = """
import sys
from pathlib import Path
from flows.finetune import finetune
from stages.runtime import Runtime

recipe, store, cache = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
finetune(recipe, runtime=Runtime(store=store, cache=Path(cache)), return_state=True).result()
"""


@pytest.mark.failure(
    what="twenty runs at once over one store, under one server with SQLite",
    outcome="each run, each of its stages and each event is on record; no `database is locked`",
)
def test_twenty_runs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_LOG_RETRYABLE_ERRORS", "true")  # it hides what its clients try again
    store = str(tmp_path / "store")
    recipes = []
    for name in range(NAMES):
        rehearsal = Rehearsal(tmp_path / f"bot-{name}", store, f"bot-{name}")
        rehearsal.folder.mkdir()
        for right in range(8, 8 * EACH + 1, 8):
            run = rehearsal.make(rehearsal.start(right), until="evaluate")
            recipes.append(rehearsal.folder / f"{right}.yaml")
            recipes[-1].write_text(run.loaded.text)
    with own_server(tmp_path / "prefect", port=0) as api:
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", RUN, str(recipe), store, str(tmp_path / "cache")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PREFECT_API_URL": api.url},
            )
            for recipe in recipes
        ]
        for each in runs:
            assert each.stdout and each.stdout.readline() == "ready\n"
        for each in runs:
            assert each.stdin
            each.stdin.write("\n")
            each.stdin.flush()
        told = [each.communicate(timeout=900) for each in runs]
        assert [each.returncode for each in runs] == [0] * len(runs), told
        # Task states travel as events, which the server has received and writes down when it comes to it.
        eventually(lambda: tasks_of(tmp_path), recorded)
    log = (tmp_path / "prefect/server.log").read_text()
    assert log.count("database is locked") == 0
    records = [record for _, record in rehearsal.store.runs() if record["status"] == "finished"]
    assert len(records) == len(runs)
    moved = sum(record["outcome"]["production"] == "moved" for record in records)
    with sqlite3.connect(tmp_path / "prefect/prefect.db") as database:
        states = Counter(database.execute("select state_type, state_name from flow_run"))
        events = Counter(database.execute("select event from events where event like 'regrow.%'"))
    assert sum(states.values()) == len(runs) and {kind for kind, _ in states} == {"COMPLETED"}
    assert set(tasks_of(tmp_path).values()) == {len(runs)}
    assert events[("regrow.model.published",)] == moved >= NAMES


def tasks_of(folder: Path) -> Counter[tuple[str, str]]:
    """How many task runs of a stage are in a state, by the server's database."""
    with sqlite3.connect(folder / "prefect/prefect.db") as database:
        return Counter(database.execute("select name, state_type from task_run"))


def recorded(tasks: Counter[tuple[str, str]]) -> bool:
    """Whether as many as there should be are completed, and none is in any other state."""
    return sum(tasks.values()) == 8 * NAMES * EACH and {state for _, state in tasks} == {"COMPLETED"}
