"""Ctrl-C and SIGTERM end a command with a word, an exit code, and the line that goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flows.history import events_of
from stages.store import open_store
from tests.flows.conftest import Tiny

SCRIPT = """
import os, signal, sys
from flows import cli
from flows.execute import Follower, following

def stop(run, stage):
    if stage == "convert":
        os.kill(os.getpid(), int(os.environ["STOP"]))

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have taken from what it starts aside
with following(Follower(started=stop)):
    cli.main()
"""


def test_ctrl_c_while_planning_is_told(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)
    environment = {**os.environ, "STOP": "0"}
    command = [sys.executable, "-c", SCRIPT, "plan", str(recipe), "--store", str(tmp_path / "store")]
    with (
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process,
        recipe.open("w"),  # once it reads
    ):
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "error: interrupted\n")


@pytest.mark.parametrize(
    ("stop", "code", "says", "status"),
    [
        (signal.SIGINT, 130, "interrupted", "interrupted"),
        (signal.SIGTERM, 75, "stopped on SIGTERM; what was finished is kept", "suspended"),
    ],
)
def test_a_run_that_is_stopped_says_how_to_go_on(
    make_tiny: Callable[[], Tiny], stop: signal.Signals, code: int, says: str, status: str
) -> None:
    tiny = make_tiny()
    recipe = tiny.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.recipe))
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        "run",
        str(recipe),
        "+tokenize",
        "--force",
        "1+convert",
        "--force=tokenize",
    ]
    places = {"REGROW_STORE": tiny.runtime.store, "REGROW_CACHE": str(tiny.runtime.cache)}
    environment = {**os.environ, **places, "PREFECT_API_URL": tiny.api.url, "STOP": str(int(stop))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    goes_on = f"continue with: regrow run {command[4]} +tokenize --force convert --force tokenize"  # fetch is made
    assert done.stderr.splitlines() == [f"error: {says}", goes_on]
    [event] = events_of(open_store(tiny.runtime.store, tiny.runtime.cache), "tiny")
    assert event.what == status
