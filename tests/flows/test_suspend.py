"""A spot machine's warning: `regrow run` gets SIGTERM while it trains, and the same command goes on from there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPT = """
import os, signal, sys
from flows import cli
from flows.execute import Follower, following

def warn(run, stage, event):
    if stage == "train" and event["event"] == "tell" and "loss" in event["metrics"] and "WARN" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)

with following(Follower(event=warn)):
    cli.main()
"""


@pytest.mark.full
@pytest.mark.failure(
    what="SIGTERM while training (a spot machine's warning)",
    outcome="exit code 75 with the state saved; the same command goes on",
)
def test_sigterm_in_training_suspends_and_the_same_command_goes_on(make_tiny: Callable[[], Any]) -> None:
    tiny = make_tiny()
    recipe = tiny.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.recipe | {"train": tiny.recipe["train"] | {"epochs": 15}}))
    command = [sys.executable, "-c", SCRIPT, "run", str(recipe), "+train"]
    places = {"REGROW_STORE": tiny.runtime.store, "REGROW_CACHE": str(tiny.runtime.cache)}
    environment = {**os.environ, **places, "PREFECT_API_URL": tiny.api.url}

    warned = subprocess.run(command, env={**environment, "WARN": "1"}, capture_output=True, text=True, timeout=300)
    assert warned.returncode == 75, warned.stdout + warned.stderr
    assert "error: saved its state and stopped on SIGTERM" in warned.stderr
    assert "continue with: regrow run" in warned.stderr
    assert "Traceback" not in warned.stdout + warned.stderr
    [record] = [json.loads(path.read_text()) for path in Path(tiny.runtime.store).glob("runs/*.json")]
    assert (record["status"], record["reason"]) == ("suspended", "saved its state and stopped on SIGTERM")

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    facts = next(Path(tiny.runtime.store).glob("actions/train/*.json")).read_text()
    assert '"resumed_at_step": 0' not in facts
