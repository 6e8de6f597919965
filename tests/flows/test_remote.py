"""`regrow run --on up`: what workers are told of the machine that sends a run, and how it ends for who sent it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.local import Selection
from flows.parameters import filled
from flows.remote import order
from flows.run import Run
from stages.runtime import Runtime
from tests.flows.raised import Raised
from tests.flows.rehearsal import Rehearsal


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Rehearsal(tmp_path).start(20)


def sent(run: Run, settings: dict[str, Any], here: bool) -> dict[str, Any]:
    return order(replace(run, runtime=Runtime.model_validate(settings)), Selection(), here=here)


def test_workers_elsewhere_are_told_nothing_of_this_machine(run: Run) -> None:
    told = sent(run, {}, here=False)
    assert told["parameters"]["runtime"] is None and told["job_variables"] is None
    assert told["parameters"]["run"] == "", "its record is in a store that they do not know"
    del told["parameters"]["recipe"]  # which says where the data is, here or there
    assert "/" not in json.dumps(told)


def test_workers_elsewhere_are_told_what_was_set(run: Run) -> None:
    told = sent(run, {"store": "s3://bucket/store", "device": "cuda"}, here=False)["parameters"]
    assert told["runtime"] == {"store": "s3://bucket/store", "device": "cuda"}
    assert told["run"] == run.id


def test_workers_here_go_on_from_this_folder_in_this_store(run: Run) -> None:
    told = sent(run, {}, here=True)
    assert told["parameters"]["runtime"] == {"store": Runtime().store} and told["parameters"]["run"] == run.id
    assert told["job_variables"] == {"working_dir": str(Path.cwd())}


def test_what_a_run_leaves_out_is_as_the_worker_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_STORE", "s3://workers/store")
    monkeypatch.setenv("REGROW_DEVICE", "cuda")
    of_the_run = filled(Runtime.model_validate({"device": "cpu"}))
    assert (of_the_run.store, of_the_run.device) == ("s3://workers/store", "cpu")
    assert filled(None).device == "cuda"


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_run_that_waits_for_a_person_is_no_failure(raised: Raised, tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path, name="asks")
    told = rehearsal.ready(20, approval=True)
    runtime = tmp_path / "runtime.yaml"
    runtime.write_text(yaml.safe_dump(told["runtime"]))
    said = raised.regrow("run", told["recipe"], "--on", "up", "--runtime", str(runtime), expect=0)
    assert f"waits      for a person, who decides there: {raised.url.removesuffix('/api')}/" in said
    assert rehearsal.stands == ""
