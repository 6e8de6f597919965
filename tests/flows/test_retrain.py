"""Scheduled retraining on a real server: asking a person, one at a time, killed, cancelled.

The models are made by hand (`rehearsal`), so that a whole retraining is its card, its gate and its ref.
"""

import os
import signal
from pathlib import Path
from uuid import UUID

import pytest

from flows.processes import process
from stages.lease import lease
from stages.production import production
from stages.store import Artifact
from tests.flows.raised import Raised, eventually
from tests.flows.rehearsal import Rehearsal

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path, name=f"bot-{tmp_path.name[-8:].replace('_', '-').strip('-')}")


def test_a_person_is_asked_and_what_was_shown_is_what_is_promoted(raised: Raised, rehearsal: Rehearsal) -> None:
    parameters = rehearsal.ready(20, approval=True)
    run = raised.send("retrain/scheduled", parameters)
    waiting = raised.wait(run, lambda found: found.state is not None and found.state.is_paused())
    assert rehearsal.stands == ""
    with raised.client() as client:
        body = {"prefix": waiting.state.state_details.run_input_keyset["description"]}  # type: ignore[union-attr,index]
        shown = client._client.post(f"/flow_runs/{run}/input/filter", json=body).json()[0]["value"]
    assert "spelling" in shown and "0.500" in shown
    made = next(r for _, r in rehearsal.store.runs() if r["run"].endswith(str(run)[-6:]))
    (rehearsal.folder / "rows.jsonl").write_text('{"question": "new", "answer": "new"}\n')
    Path(parameters["recipe"]).write_text("name: another")
    with raised.client() as client:
        answer = {"promote": True, "why": "looks good", "by": "ada"}
        client._client.post(f"/flow_runs/{run}/resume", json={"run_input": answer}).raise_for_status()
    ended = raised.ended(run)
    assert ended.state and ended.state.name == "Completed", ended.state
    assert rehearsal.stands == made["stages"]["merge"]["key"]
    found = production(rehearsal.store, rehearsal.name)
    assert found and found.now.by == "ada" and "looks good" in found.now.why


def test_what_was_made_by_force_is_not_made_anew_behind_a_persons_back(raised: Raised, rehearsal: Rehearsal) -> None:
    run = raised.send("finetune/recipe", {**rehearsal.ready(20, approval=True), "force": ["publish"]})
    raised.wait(run, lambda found: found.state is not None and found.state.is_paused())
    shown = card(rehearsal)
    with raised.client() as client:
        client._client.post(f"/flow_runs/{run}/resume", json={"run_input": {"promote": True}}).raise_for_status()
    ended = raised.ended(run)
    assert ended.state and ended.state.name == "Completed", ended.state
    assert rehearsal.stands and card(rehearsal) == shown
    assert shown.provenance["run"].endswith(str(run)[-6:])


def test_two_retrainings_of_a_name_never_run_at_once_and_a_killed_one_is_told(
    raised: Raised, rehearsal: Rehearsal
) -> None:
    told = rehearsal.ready(20)
    with lease(rehearsal.store, "retrain", rehearsal.name, 60.0, "the test"):
        run = raised.send("retrain/scheduled", told)
        raised.wait(run, lambda found: found.state is not None and found.state.is_running())
        pid = eventually(lambda: flow_process(run), bool)
        assert rehearsal.stands == ""
        os.kill(pid, signal.SIGKILL)
        crashed = raised.ended(run)
        assert crashed.state and crashed.state.is_crashed(), crashed.state
        other = raised.send("retrain/scheduled", told)
        raised.wait(other, lambda found: found.state is not None and found.state.is_running())
        eventually(lambda: flow_process(other), bool)
        with raised.client() as client:
            client._client.post(
                f"/flow_runs/{other}/set_state", json={"state": {"type": "CANCELLING", "name": "Cancelling"}}
            ).raise_for_status()
        cancelled = raised.ended(other)
        assert cancelled.state and cancelled.state.is_cancelled(), cancelled.state
        assert eventually(lambda: flow_process(other), lambda pid: not pid) == 0
        assert rehearsal.stands == ""
    last = raised.ended(raised.send("retrain/scheduled", told))
    assert last.state and last.state.name == "Completed" and rehearsal.stands


def card(rehearsal: Rehearsal) -> Artifact:
    [key] = [key for stage, key, _ in rehearsal.store.manifests() if stage == "publish"]
    found = rehearsal.store.find("publish", key)
    assert found is not None
    return found


def flow_process(run: UUID) -> int:
    """The process that works on a flow run, 0 when there is none."""
    wanted = f"PREFECT__FLOW_RUN_ID={run}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0") and process(int(entry.name)):
                return int(entry.name)
        except OSError:
            continue
    return 0
