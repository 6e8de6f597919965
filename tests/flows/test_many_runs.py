"""Two hundred stored runs slow nothing: the plan reads no run record, the history the latest ones."""

import time
from pathlib import Path
from typing import Any

import pytest

from flows.history import events_of
from flows.plan import make_plan
from stages.store import Store
from tests.flows.rehearsal import Rehearsal

RUNS = 200


def filled(rehearsal: Rehearsal) -> None:
    """As many runs as a year of nights leaves, a few of them of another name."""
    run, _ = rehearsal.run(20)
    record = rehearsal.store.read_run(run.id)
    assert record is not None
    record = {**record, "outcome": {**record["outcome"], "production": "refused"}}  # only the first one moved it
    for number in range(RUNS):
        name = "another" if number % 10 == 0 else rehearsal.name
        text = record["text"] + "# " + "x" * 20_000
        rehearsal.store.write_run(
            f"20260101-000000-{number:06x}", {**record, "run": f"r{number}", "recipe": name, "text": text}
        )


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_plan_and_history_with_many_runs(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "store") if kind == "folder" else request.getfixturevalue("s3").url
    rehearsal = Rehearsal(tmp_path, url)
    filled(rehearsal)
    run = rehearsal.start(20)
    reads: list[str] = []
    objects = type(run.store.objects)
    read = objects.read

    def counted(self: Any, path: str) -> Any:
        reads.append(path)
        return read(self, path)

    monkeypatch.setattr(objects, "read", counted)
    assert make_plan(run).to_run == []
    assert not [path for path in reads if path.startswith("runs/")], "so it costs what it costs without them"
    reads.clear()
    assert timed(run.store) < 2.0
    assert len(reads) <= 3 * 2 * 32, "a name that ran often is told from its latest runs, a page or two of them"


def timed(store: Store) -> float:
    """Seconds of processor and of waiting for a history, the best of three: other jobs disturb the rest."""
    found = []
    for _ in range(3):
        started = time.monotonic()
        assert len(events_of(store, "bot")) == 20
        found.append(time.monotonic() - started)
    print(f"history of {RUNS} runs: {min(found):.3f} s")
    return min(found)
