"""The child process: events and noise are kept apart, failures are told, and nothing outlives its parent."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stages.child import ChildFailed, ChildRefused, Event, Suspended, Task, run_in_child

TOYS = os.pathsep.join(map(str, (Path(__file__).parent / "toys", Path(__file__).parents[2])))


@pytest.fixture(autouse=True)
def _toys_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", TOYS)


def run(does: str, tmp_path: Path, **options: object) -> tuple[list[Event], list[str]]:
    events: list[Event] = []
    lines: list[str] = []
    (tmp_path / "output").mkdir(exist_ok=True)
    task = Task("one", {"does": does}, {}, str(tmp_path / "output"), str(tmp_path))
    run_in_child("toy_stage", [task], {}, events.append, lines.append, **options)  # type: ignore[arg-type]
    return events, lines


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int) -> bool:
    """Wait for a process that is not our child to end, on a pidfd: no polling, at most ten seconds."""
    import select

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(fd):
        return bool(select.select([fd], [], [], 10)[0])


def test_events_come_back_and_noise_goes_to_the_log(tmp_path: Path) -> None:
    events, lines = run("write", tmp_path)
    assert [e["event"] for e in events] == ["tell", "task"]
    assert events[-1]["facts"] == {"rows": 2}
    assert lines == ["a library's noise"]
    assert (tmp_path / "output" / "out.txt").read_text() == "made"


def test_a_refusal_is_told_as_it_stands(tmp_path: Path) -> None:
    with pytest.raises(ChildRefused, match=r"^rows.jsonl:3: no `text` field; expected one$"):
        run("refuse", tmp_path)


def test_nothing_is_imported_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenize.py").write_text("raise SystemExit('the wrong one')")  # what Python itself has too
    (tmp_path / "helper.py").write_text("def shorten(text): return text")
    monkeypatch.chdir(tmp_path)
    events, _ = run("import", tmp_path)
    assert not Path(events[-1]["facts"]["tokenize"]).is_relative_to(tmp_path)
    says = r"No module named 'helper' \(line 1\)\. Code of your own is one file.*write what it needs of helper into it"
    with pytest.raises(ChildRefused, match=says):
        run("import beside", tmp_path)


def test_what_the_user_has_set_changes_nothing_that_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run("compute", tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    events, _ = run("compute", tmp_path)
    assert events[-1]["facts"] == plain[-1]["facts"]
    assert plain[-1]["facts"]["precision"] == "no"


def test_a_full_disk_is_told_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ChildRefused, match=f"^{tmp_path}: the disk is full; free some space.*REGROW_CACHE"):
        run("fill", tmp_path)


def test_a_failure_names_the_error_and_logs_the_traceback(tmp_path: Path) -> None:
    lines: list[str] = []
    task = Task("one", {"does": "fail"}, {}, str(tmp_path), str(tmp_path))
    with pytest.raises(ChildFailed, match="RuntimeError: broken inside"):
        run_in_child("toy_stage", [task], {}, lambda e: None, lines.append)
    assert any("Traceback" in line for line in lines)


def test_a_killed_worker_is_told_by_its_signal(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="SIGKILL"):
        run("die", tmp_path)


def test_a_grandchild_left_behind_is_ended_and_does_not_hang_us(tmp_path: Path) -> None:
    events, _ = run("orphan", tmp_path)
    assert events[-1]["event"] == "task"


def test_a_stop_request_ends_the_whole_group(tmp_path: Path) -> None:
    grandchild: list[int] = []
    stop = threading.Event()

    def on_event(event: Event) -> None:
        if "grandchild" in event.get("metrics", {}):
            grandchild.append(event["metrics"]["grandchild"])
            stop.set()

    task = Task("one", {"does": "hang"}, {}, str(tmp_path), str(tmp_path))
    with pytest.raises(Suspended, match="told to"):
        run_in_child("toy_stage", [task], {}, on_event, lambda line: None, lambda: "told to" if stop.is_set() else "")
    assert wait_gone(grandchild[0]) or not alive(grandchild[0])


@pytest.mark.full
@pytest.mark.failure(
    what="a stage hangs",
    outcome="it is ended after its time, with where it stood in the log",
)
def test_a_stage_that_hangs_is_ended_with_its_stacks_in_the_log(tmp_path: Path) -> None:
    grandchild: list[int] = []
    lines: list[str] = []

    def on_event(event: Event) -> None:
        grandchild.extend(filter(None, [event.get("metrics", {}).get("grandchild")]))

    task = Task("one", {"does": "hang"}, {}, str(tmp_path), str(tmp_path))
    with pytest.raises(ChildFailed, match="toy_stage gave no sign of life for 15 s"):
        run_in_child("toy_stage", [task], {}, on_event, lines.append, silence=15.0)
    assert any("toy_stage.py" in line and "in run" in line for line in lines), lines
    assert wait_gone(grandchild[0]) or not alive(grandchild[0])


@pytest.mark.failure(
    what="the process that runs a stage is killed",
    outcome="the kernel ends all processes of the stage",
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_parent_dies_nothing_of_the_stage_survives(tmp_path: Path, how: signal.Signals) -> None:
    script = f"""
import json, sys
from stages.child import Task, run_in_child
def on_event(event):
    print(json.dumps(event["metrics"]), flush=True)
run_in_child("toy_stage", [Task("one", {{"does": "hang"}}, {{}}, {str(tmp_path)!r}, {str(tmp_path)!r})], {{}},
             on_event, lambda line: None)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = json.loads(parent.stdout.readline())["pid"]
        grandchild = json.loads(parent.stdout.readline())["grandchild"]
        parent.send_signal(how)
        parent.wait(20)
    assert wait_gone(worker)
    assert wait_gone(grandchild)
