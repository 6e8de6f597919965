"""Whole runs of two machines over one store in a folder, the clock of one of them wrong by two years; Prefect's server
has the right one. (A bucket refuses such a machine: `tests/stages/test_store_errors.py`.) libfaketime also sets what
`utime` writes: as on a file system that takes the word of whoever writes."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas import filters
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import IntervalSchedule

from tests.flows.raised import Raised, eventually
from tests.flows.rehearsal import Rehearsal
from tests.flows.victim import Victim
from tests.wrong_clock import wrong_clock

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

STAGES = ("fetch", "convert", "tokenize", "pack", "train")


@pytest.mark.failure(
    what="two runs of one recipe at once, the clock of one machine ahead or behind by two years",
    outcome="each stage is made once, no lease is taken from who lives; the times in a record are its machine's own",
)
@pytest.mark.parametrize("by", ["+2y", "-2y"])
def test_two_runs_of_which_one_has_a_wrong_clock(by: str, victim: Victim, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**victim.recipe, "train": {"lora": {"rank": 2}, "epochs": 4}}))
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "run", str(path), "+train"],
            env=machine(victim, tmp_path / f"machine{n}") | clock,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n, clock in enumerate((wrong_clock(by, tmp_path), {}))
    ]
    told = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    records = [record for _, record in victim.store.runs()]
    assert len(records) == 2 and {record["status"] for record in records} == {"finished"}
    one, other = (datetime.fromisoformat(record["written"]) for record in records)
    assert abs(one - other) > timedelta(days=700), "one of them really had another clock"
    for stage in STAGES:
        assert sum(record["stages"][stage]["made"] for record in records) == 1, stage
    for folder in ("superseded/", "quarantine/"):
        assert not list(victim.store.objects.list(folder)), folder
    victim.left_nothing()


@pytest.mark.failure(
    what="`regrow gc --delete` on a machine whose clock is ahead by two years, while a run trains elsewhere",
    outcome="nothing that is young by the store's clock goes; the run ends *Completed*",
)
def test_gc_with_a_wrong_clock_while_a_run_trains(victim: Victim, tmp_path: Path) -> None:
    run = victim.send()
    victim.trains(run)
    swept = subprocess.run(
        [sys.executable, "-m", "flows.cli", "gc", "--delete", "--json"],
        env=machine(victim, tmp_path / "elsewhere") | wrong_clock("+2y", tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert swept.returncode == 0, swept.stdout + swept.stderr
    report = json.loads(swept.stdout)
    assert report["deleted"] and report["swept"] == {}
    assert sum(tally["count"] for tally in report["freed"].values()) == 0, report["freed"]
    ended = victim.raised.ended(run)
    assert ended.state and ended.state.is_completed(), ended.state
    victim.left_nothing()
    assert victim.trained()["resumed_at_step"] == 0


@pytest.mark.failure(
    what="a scheduled retraining on a machine whose clock is ahead by two years",
    outcome="the schedule's later runs stay *Scheduled*: the server's clock says what is due",
)
def test_a_wrong_clock_takes_no_later_run_for_due(raised: Raised, tmp_path: Path) -> None:
    parameters = Rehearsal(tmp_path, name="ahead").ready(20)
    hourly = IntervalSchedule(interval=timedelta(hours=1), anchor_date=datetime.now(UTC) + timedelta(minutes=30))
    with raised.client() as client:
        deployment = client.read_deployment_by_name("retrain/scheduled")
        every = DeploymentScheduleCreate(schedule=hourly, active=True, slug="ahead", parameters=parameters)
        [schedule] = client.create_deployment_schedules(deployment.id, [every])
        of_deployment = filters.FlowRunFilter(
            deployment_id=filters.FlowRunFilterDeploymentId(any_=[deployment.id]),
        )

        def later() -> list[str]:
            """The states of the runs that the schedule has made."""
            runs = client.read_flow_runs(flow_run_filter=of_deployment)
            return [str(r.state_name) for r in runs if r.parameters == parameters and r.auto_scheduled]

        try:
            eventually(later, bool)
            ended = raised.ended(raised.send("retrain/scheduled", parameters, wrong_clock("+2y", tmp_path)))
            assert ended.state and ended.state.name == "Completed", ended.state
            assert set(later()) == {"Scheduled"}
        finally:
            client.delete_deployment_schedule(deployment.id, schedule.id)


def machine(victim: Victim, cache: Path) -> dict[str, str]:
    """The environment of somebody who uses the same store and server, with a cache of their own."""
    places = {"REGROW_STORE": victim.runtime.store, "REGROW_CACHE": str(cache)}
    return {**os.environ, **places, "PREFECT_API_URL": victim.raised.url}
