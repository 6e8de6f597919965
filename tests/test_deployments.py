"""The files in deployments/, as far as they can be tried without their platforms: they parse, their commands are real
commands, and the Slurm script does what it says with a stand-in for the scheduler."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import app
from flows.graph import ORDER

HERE = Path(__file__).parents[1] / "deployments"


def commands() -> list[list[str]]:
    """Every command that the compose file and the job start."""
    services = yaml.safe_load((HERE / "compose.yaml").read_text())["services"]
    found = [service["command"] for name, service in services.items() if "command" in service and name != "store"]
    job = yaml.safe_load((HERE / "kubernetes-job.yaml").read_text())
    return [*found, *(container["command"] for container in job["spec"]["template"]["spec"]["containers"])]


@pytest.mark.parametrize("command", commands(), ids=shlex.join)
def test_containers_start_commands_that_exist(command: list[str]) -> None:
    if command[0] == "python":
        assert command[1:] == ["-m", "flows.deployments"]
    elif command[0] == "regrow":
        assert command[1] in {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    else:
        assert command[:3] in (["prefect", "server", "start"], ["prefect", "worker", "start"])


def test_every_stage_has_a_deployment() -> None:
    listed = yaml.safe_load((HERE / "prefect.yaml").read_text())["deployments"]
    stages = {d["parameters"]["stage"]: d["name"] for d in listed if d["entrypoint"] == "flows.stage.stage"}
    assert stages == {stage: stage for stage in ORDER}


def test_passwords_come_from_outside() -> None:
    text = (HERE / "compose.yaml").read_text()
    assert not re.search(r"(PASSWORD|SECRET\w*|KEY\w*): (?!\$\{)", text)
    assert re.search(r'ports: \["127\.0\.0\.1:', text), "the dashboard is for this host only"


def test_bad_input_is_not_tried_again_and_a_drained_node_counts_for_nothing() -> None:
    job: dict[str, Any] = yaml.safe_load((HERE / "kubernetes-job.yaml").read_text())["spec"]
    fail, ignore = job["podFailurePolicy"]["rules"]
    assert fail["onExitCodes"]["values"] == [2, 4] and ignore["action"] == "Ignore"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_slurm_queues_a_suspended_run_again(code: int, requeued: bool, tmp_path: Path) -> None:
    for name, text in (("regrow", f"exit {code}"), ("scontrol", f'echo "$@" > {tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run([HERE / "slurm.sh", "recipe.yaml"], env=environment, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() is requeued


def test_slurm_passes_the_warning_on_and_waits(tmp_path: Path) -> None:
    """The signal goes to the script alone; the run saves its state and only then the job is queued again."""
    saving = "trap 'sleep 0.3; exit 75' TERM; touch started; while :; do sleep 0.05; done"
    for name, text in (("regrow", saving), ("scontrol", "touch requeued")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen([HERE / "slurm.sh", "recipe.yaml"], env=environment, cwd=tmp_path)
    while not (tmp_path / "started").exists():
        assert job.poll() is None
    job.terminate()
    assert job.wait(timeout=60) == 75
    assert (tmp_path / "requeued").exists()


LOGS = """
import os, sys
reads, writes = os.pipe()
os.dup2(writes, 1)
os.dup2(writes, 2)
os.close(reads)  # nobody reads what this process prints: its worker has died
from prefect.logging import get_logger
from prefect.logging.configuration import setup_logging
setup_logging()
names = {"flow_run_name": "run", "flow_name": "flow", "flow_run_id": "id"}
get_logger("flow_runs").info("trained", extra=names)
"""


@pytest.mark.failure(
    what="the worker of a run has died when the run logs its next line",
    outcome="the run goes on: it writes to the dashboard only; Prefect's console would end a process nobody reads",
)
@pytest.mark.parametrize("ours", [True, False])
def test_a_run_outlives_the_pipe_to_its_worker(ours: bool) -> None:
    listed = yaml.safe_load((HERE / "prefect.yaml").read_text())["deployments"]
    [quiet] = {frozenset(d["work_pool"]["job_variables"]["env"].items()) for d in listed}
    environment = {**os.environ, "PREFECT_LOGGING_TO_API_ENABLED": "false", **(dict(quiet) if ours else {})}
    done = subprocess.run([sys.executable, "-c", LOGS], env=environment, timeout=120)
    assert (done.returncode == 0) is ours
