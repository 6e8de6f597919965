"""Retraining as a team lives it, on a real server: new files, their training, the gate, production, and what
automations send; nothing new; new objects in a bucket; a schedule that was late."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.schemas import filters
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule

from stages.production import production
from stages.runtime import Runtime
from stages.store import Store, open_store
from tests.conftest import S3, _client
from tests.flows.conftest import tiny_recipe
from tests.flows.raised import Raised, eventually
from tests.flows.rehearsal import Rehearsal
from tests.stages.faulty_proxy import faulty_proxy

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def told(raised: Raised, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """What the automations of `deployments/automations.yaml` have sent, as bodies; made as the guide says."""
    received: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = automations(raised, tmp_path, f"http://127.0.0.1:{server.server_address[1]}/")
    yield received
    with raised.client() as client:
        for automation in made:
            client.delete_automation(automation)
    server.shutdown()
    server.server_close()


def automations(raised: Raised, folder: Path, url: str) -> list[UUID]:
    """What the guide's commands make, whatever they ask for answered with `url`."""
    guide = (ROOT / "docs/operating.md").read_text()
    setting, *blocks, create = re.findall(r"### Being told.*?```sh\n(.*?)```", guide, re.S)[0].splitlines()
    assert setting.startswith("export PREFECT_API_URL=") and len(blocks) == 2
    places = {"PREFECT_API_URL": raised.url, "PREFECT_HOME": str(folder / "prefect"), "COLUMNS": "200"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def ids(command: str) -> list[str]:
        """The ids that a command prints."""
        environment = {**os.environ, **places, "PATH": path}
        done = subprocess.run(
            ["bash", "-c", command], input=f"{url}\n", cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", done.stdout)

    text = (ROOT / "deployments/automations.yaml").read_text()
    for number, command in enumerate(blocks, start=1):
        [block] = ids(command)
        text = text.replace(str(UUID(int=number)), block)
    (folder / "automations.yaml").write_text(text)
    made = [UUID(found) for found in ids(create)]
    assert len(made) == 2
    return made


def made_by(store: Store, stage: str) -> dict[str, set[str]]:
    """Keys of a stage's artifacts by the run that made them."""
    found: dict[str, set[str]] = {}
    for entry in store.objects.list(f"actions/{stage}/"):
        data = store.objects.read(entry.path)
        assert data is not None
        found.setdefault(json.loads(data.data)["provenance"]["run"], set()).add(entry.path)
    return found


def pages(raised: Raised, run: FlowRun) -> dict[str, str]:
    """What the dashboard shows of a run, by key."""
    with raised.client() as client:
        of_run = filters.ArtifactFilter(flow_run_id=filters.ArtifactFilterFlowRunId(any_=[run.id]))
        return {str(page.key): str(page.data) for page in client.read_artifacts(artifact_filter=of_run)}


def test_new_files_are_trained_on_and_replace_production_or_not(
    raised: Raised, tmp_path: Path, tiny_model: Path, told: list[dict[str, Any]]
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_model)
    recipe["name"] = "nightly"
    data = tmp_path / "tickets"
    data.mkdir()
    rows = (tmp_path / "echo.jsonl").read_text().splitlines(keepends=True)
    (data / "day1.jsonl").write_text("".join(rows[:120]))
    recipe["fetch"]["data"]["echo"] = {"files": str(data / "*.jsonl")}
    path = tmp_path / "nightly.yaml"
    path.write_text(yaml.safe_dump(recipe))
    runtime = Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache")
    store = open_store(runtime.store, tmp_path / "looking")

    def retrained(*settings: str) -> FlowRun:
        parameters = {"recipe": str(path), "settings": settings, "runtime": runtime.model_dump(mode="json")}
        return raised.ended(raised.send("retrain/scheduled", parameters))

    first = retrained()
    assert first.state and first.state.name == "Completed", first.state
    standing = production(store, "nightly")
    assert standing is not None
    [published] = eventually(lambda: list(told), bool)
    assert published == {"name": "nightly", "model": standing.now.model["key"]}
    before = {stage: made_by(store, stage) for stage in ("fetch", "convert", "tokenize", "train", "evaluate")}

    nothing = retrained()
    assert nothing.state and nothing.state.name == "NothingNew", nothing.state
    assert "every stage of nightly is in the store" in str(nothing.state.message)
    assert nothing.expected_start_time and nothing.start_time and nothing.end_time
    whole, inside = (nothing.end_time - since for since in (nothing.expected_start_time, nothing.start_time))
    print(
        f"nothing new: {whole.total_seconds():.1f} s after it was due, {inside.total_seconds():.1f} s of it in the flow"
    )
    assert whole.total_seconds() <= 30
    assert {stage: made_by(store, stage) for stage in before} == before
    with raised.client() as client:
        of_run = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[nothing.id]))
        assert client.read_task_runs(flow_run_filter=of_run) == []

    (data / "day2.jsonl").write_text("".join(rows[120:]))
    stricter = "publish.gate.production.max_heldout_loss_increase=-100"
    worse = retrained(stricter)
    assert worse.state and worse.state.name == "GateFailed", worse.state
    assert "production" in str(worse.state.message)
    assert production(store, "nightly") == standing
    for stage, parts in (("fetch", 1), ("convert", 1), ("tokenize", 1)):
        [new] = made_by(store, stage).keys() - before[stage].keys()
        assert len(made_by(store, stage)[new]) == parts + 1, f"{stage}: the new file's part and the whole"
    [this] = made_by(store, "evaluate").keys() - before["evaluate"].keys()
    # Its task, three losses over the new plan's held-out rows, and the whole: what the others answered is known.
    assert len(made_by(store, "evaluate")[this]) == 5
    shown = pages(raised, worse)["scores"]
    assert "Against the model in production when the run started" in shown
    _, failed = eventually(lambda: list(told), lambda found: len(found) == 2)
    subject, body = failed["text"].split("\n", 1)
    assert subject == "nightly was not published" and "held-out loss" in body

    better = retrained()
    assert better.state and better.state.name == "Completed", better.state
    now = production(store, "nightly")
    assert now is not None and now.now.model != standing.now.model
    assert now.now.compared == standing.now.model
    *_, published = eventually(lambda: list(told), lambda found: len(found) == 3)
    assert published == {"name": "nightly", "model": now.now.model["key"]}
    assert (tmp_path / "out/README.md").exists()


def test_of_a_bucket_only_the_new_objects_are_brought(raised: Raised, tmp_path: Path, tiny_model: Path, s3: S3) -> None:
    """Store and data in one bucket; what is asked of the data goes through a proxy that writes it down."""
    recipe = tiny_recipe(tmp_path, tiny_model)
    recipe["name"] = "from-a-bucket"
    rows = (tmp_path / "echo.jsonl").read_text().splitlines(keepends=True)
    store = open_store(s3.url, tmp_path / "looking")

    def arrives(name: str, some: list[str]) -> None:
        _client(s3.endpoint).pipe_file(f"{s3.bucket}/tickets/{name}", "".join(some).encode())

    with faulty_proxy(s3.endpoint) as proxy:
        options = {"endpoint_url": proxy.endpoint}
        recipe["fetch"]["data"]["echo"] = {"files": f"s3://{s3.bucket}/tickets/*.jsonl", "storage_options": options}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        runtime = Runtime(store=s3.url, cache=tmp_path / "cache")
        parameters = {"recipe": str(path), "runtime": runtime.model_dump(mode="json")}

        def retrained() -> tuple[str, set[str]]:
            """How the run ended, and which objects it has read."""
            proxy.asked.clear()
            ended = raised.ended(raised.send("retrain/scheduled", parameters, s3.environment))
            assert ended.state is not None
            read = re.findall(r"^GET \S+/tickets/([\w.]+)", "\n".join(proxy.asked), re.M)
            return str(ended.state.name), set(read)

        arrives("day1.jsonl", rows[:120])
        assert retrained() == ("Completed", {"day1.jsonl"})
        stages = ("fetch", "convert", "tokenize", "train")
        before = {stage: made_by(store, stage) for stage in stages}
        assert retrained() == ("NothingNew", set())
        assert {stage: made_by(store, stage) for stage in stages} == before
        arrives("day2.jsonl", rows[120:160])
        arrives("day3.jsonl", rows[160:])
        assert retrained() == ("Completed", {"day2.jsonl", "day3.jsonl"})
        for stage in ("fetch", "convert", "tokenize"):
            [new] = made_by(store, stage).keys() - before[stage].keys()
            assert len(made_by(store, stage)[new]) == 3, f"{stage}: the new objects' parts and the whole"
        assert retrained() == ("NothingNew", set())


@pytest.mark.failure(
    what="nobody works while a schedule's runs come due",
    outcome="one of them does the work, the others end as *CaughtUp*",
)
def test_a_late_schedule_is_caught_up_once(raised: Raised, tmp_path: Path) -> None:
    """The real scheduler: the queue is paused while several runs come due, then goes on."""
    rehearsal = Rehearsal(tmp_path, name="late")
    run = rehearsal.make(rehearsal.start(20), until="evaluate")
    recipe = tmp_path / "late.yaml"
    recipe.write_text(run.loaded.text)
    parameters = {"recipe": str(recipe), "runtime": {"store": rehearsal.store.url, "cache": str(run.runtime.cache)}}
    with raised.client() as client:
        deployment = client.read_deployment_by_name("retrain/scheduled")
        [queue] = [q for q in client.read_work_queues("gpu") if q.name == "scheduled"]
        every = DeploymentScheduleCreate(
            schedule=IntervalSchedule(interval=timedelta(seconds=5)), active=True, slug="late", parameters=parameters
        )

        def due() -> list[FlowRun]:
            of_deployment = filters.FlowRunFilter(
                deployment_id=filters.FlowRunFilterDeploymentId(any_=[deployment.id]),
                state=filters.FlowRunFilterState(name=filters.FlowRunFilterStateName(any_=["Late"])),
            )
            return [r for r in client.read_flow_runs(flow_run_filter=of_deployment) if r.parameters == parameters]

        client.update_work_queue(queue.id, is_paused=True)
        [schedule] = client.create_deployment_schedules(deployment.id, [every])
        try:
            late = eventually(due, lambda found: len(found) >= 4)
            client.update_work_queue(queue.id, is_paused=False)
            ended = [raised.ended(each.id) for each in late]
        finally:
            client.update_work_queue(queue.id, is_paused=False)
            client.delete_deployment_schedule(deployment.id, schedule.id)
    names = sorted(str(each.state and each.state.name) for each in ended)
    assert names == ["CaughtUp"] * (len(late) - 1) + ["Completed"]
