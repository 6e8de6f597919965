"""Runs on the workers of `regrow up` that are hit while they train: how they end, what they leave, how they go on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.sorting import FlowRunSort

from tests.flows.raised import eventually
from tests.flows.victim import Victim, kill

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

Record = Callable[[str, object], None]


@pytest.mark.failure(
    what="the process of a run is killed while it trains",
    outcome="*Crashed*, marked by its worker; the next run trains on from the checkpoint",
)
def test_the_flow_process_is_killed(victim: Victim, record_property: Record) -> None:
    run = victim.send()
    victim.trains(run)
    killed = kill(victim.flow_process())
    ended = victim.ended(run, killed, record_property)
    assert ended.state and ended.state.is_crashed(), ended.state
    assert victim.goes_on()["resumed_at_step"] > 0


@pytest.mark.failure(
    what="the trainer is killed (an out-of-memory killer does so)",
    outcome="*Failed*, naming the signal; not tried again by itself; the next run trains on from the checkpoint",
)
def test_the_trainer_is_killed(victim: Victim, record_property: Record) -> None:
    run = victim.send()
    victim.trains(run)
    killed = kill(*victim.stage_processes()[1:])
    ended = victim.ended(run, killed, record_property)
    assert ended.state and ended.state.is_failed(), ended.state
    assert "SIGKILL" in str(ended.state.message)
    assert victim.goes_on()["resumed_at_step"] > 0


@pytest.mark.failure(
    what="a run is cancelled in the dashboard while it trains",
    outcome="*Cancelled*, with its state saved; the next run trains on from there",
)
def test_a_run_is_cancelled(victim: Victim, record_property: Record) -> None:
    run = victim.send()
    victim.trains(run)
    with victim.raised.client() as client:  # what the dashboard's button sends
        told = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        client._client.post(f"/flow_runs/{run}/set_state", json=told).raise_for_status()
    ended = victim.ended(run, time.monotonic(), record_property)
    assert ended.state and ended.state.is_cancelled(), ended.state
    assert victim.goes_on()["resumed_at_step"] > 0


@pytest.mark.failure(
    what="the worker is killed while its run trains",
    outcome="the run goes on to its end by itself; the keeper starts the worker again",
)
def test_the_worker_is_killed(victim: Victim) -> None:
    run = victim.send()
    victim.trains(run)
    was = victim.raised.kill("worker-gpu-0")
    ended = victim.raised.ended(run)
    assert ended.state and ended.state.is_completed(), ended.state
    victim.left_nothing()
    assert victim.trained()["resumed_at_step"] == 0
    eventually(lambda: victim.raised.part("worker-gpu-0"), lambda now: now != was and now.alive)


@pytest.mark.failure(
    what="Prefect's server is killed while a run trains",
    outcome="the run goes on; the keeper starts the server again, and the run ends *Completed* there",
)
def test_the_server_is_killed(victim: Victim) -> None:
    run = victim.send()
    victim.trains(run)
    victim.raised.kill("server")
    eventually(lambda: victim.raised.answers, bool)
    ended = victim.raised.ended(run)
    assert ended.state and ended.state.is_completed(), ended.state
    victim.left_nothing()
    assert victim.trained()["resumed_at_step"] == 0


@pytest.mark.failure(
    what="the disk with the local cache is full (a small mount)",
    outcome="*Failed*, naming the folder; with more room the next run goes on",
)
def test_the_disk_is_full(victim: Victim, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**victim.recipe, "train": {"lora": {"rank": 2}}}))
    (tmp_path / "small").mkdir()

    def run(megabytes: float) -> "subprocess.CompletedProcess[str]":
        mounted = f'mount -t tmpfs -o size={int(megabytes * 2**20)} none small && exec "$0" "$@"'
        command = [sys.executable, "-m", "flows.cli", "run", str(path), "+train"]
        places = {"REGROW_STORE": victim.runtime.store, "REGROW_CACHE": str(tmp_path / "small" / "cache")}
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", mounted, *command],
            cwd=tmp_path,
            env={**os.environ, **places, "PREFECT_API_URL": victim.raised.url, "PYTHONPATH": str(Path.cwd())},
            capture_output=True,
            text=True,
            timeout=600,
        )

    full = run(0.1)
    assert full.returncode in (1, 2), full.stdout + full.stderr
    assert "No space left" in full.stderr or "disk is full" in full.stderr, full.stderr
    assert "small" in full.stderr and "Traceback" not in full.stderr, full.stderr
    with victim.raised.client() as client:
        [marked] = client.read_flow_runs(limit=1, sort=FlowRunSort.START_TIME_DESC)
    assert marked.state and marked.state.is_failed() and "small" in str(marked.state.message), marked.state
    victim.left_nothing()
    done = run(64)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.failure(
    what="two runs of one recipe on two machines at once",
    outcome="each stage is made once; who comes second waits, then takes what the other made",
)
def test_two_runs_make_one_artifact(victim: Victim, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**victim.recipe, "train": {"lora": {"rank": 2}}}))
    command = [sys.executable, "-m", "flows.cli", "run", str(path), "+train"]
    both = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                "REGROW_STORE": victim.runtime.store,
                "REGROW_CACHE": str(tmp_path / f"machine{n}"),
                "PREFECT_API_URL": victim.raised.url,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(2)
    ]
    told = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    records = [record for _, record in victim.store.runs()]
    assert len(records) == 2 and {record["status"] for record in records} == {"finished"}
    for stage in ("fetch", "convert", "tokenize", "pack", "train"):
        assert sum(record["stages"][stage]["made"] for record in records) == 1, stage
    assert not list(victim.store.objects.list("superseded/"))
    victim.left_nothing()


@pytest.mark.failure(
    what="a machine vanishes with the GPU's place: keeper, workers, run and trainer die at once",
    outcome="*Crashed* by the server, 90 s after the last sign of life; the place is free, and the run that waited for "
    "it trains on from the checkpoint once a worker is there",
)
def test_a_machine_vanishes(victim: Victim, record_property: Record) -> None:
    raised = victim.raised
    run = victim.send()
    victim.trains(run)
    waits = victim.send()
    os.kill(raised.part("keeper").pid, signal.SIGSTOP)  # so that it starts nothing in between
    workers = [raised.part(name) for name in ("worker-cpu", "worker-gpu-0")]
    killed = kill(*workers, *victim.processes(), raised.part("keeper"))
    ended = victim.ended(run, killed, record_property)
    assert ended.state and ended.state.is_crashed(), ended.state
    raised.up()
    last = raised.ended(waits)
    assert last.state and last.state.is_completed(), last.state
    victim.left_nothing()
    assert victim.trained()["resumed_at_step"] > 0
