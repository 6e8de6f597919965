"""`regrow up` for real: everything is registered, and what is killed comes back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate
from prefect.client.schemas.objects import DeploymentSchedule

from flows.deployments import SILENT, listed
from flows.keeper import Settings, State, environment, read, write
from flows.up import devices, running, status, up
from stages.errors import UserError
from tests.flows.raised import Raised, eventually
from tests.flows.served import listening

ROOT = Path(__file__).parents[2]

PREFECT = (sys.executable, "-m", "prefect", "--no-prompt")

COMPARED = {"entrypoint", "work_pool_name", "work_queue_name", "job_variables", "parameters", "tags", "description"}
COMPARED |= {"concurrency_limit", "parameter_openapi_schema", "enforce_parameter_schema"}


def deployments(raised: Raised) -> dict[str, Any]:
    with raised.client() as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        return {f"{flows[d.flow_id]}/{d.name}": d for d in client.read_deployments()}


def test_every_deployment_is_registered_with_its_pool_and_queue(raised: Raised) -> None:
    found = deployments(raised)
    wanted = {d["entrypoint"].rpartition(".")[2] + "/" + d["name"]: d for d in listed(raised.home)}
    assert set(found) == set(wanted)
    for name, told in wanted.items():
        assert found[name].entrypoint == told["entrypoint"]
        pool = told["work_pool"]
        assert (found[name].work_pool_name, found[name].work_queue_name) == (pool["name"], pool["work_queue_name"])
    retrain = found["retrain/scheduled"]
    assert retrain.global_concurrency_limit.limit == 1
    assert {s.slug: (s.active, s.schedule.timezone) for s in retrain.schedules} == {
        "nightly": (False, "UTC"),
        "every-six-hours": (False, "UTC"),
    }


def test_people_come_before_schedules_and_a_gpu_has_one_run(raised: Raised) -> None:
    with raised.client() as client:
        assert client.read_work_pool("gpu").concurrency_limit == 1
        for pool in ("cpu", "gpu"):
            queues = {queue.name: queue.priority for queue in client.read_work_queues(pool)}
            assert queues["interactive"] < queues["scheduled"]
        names = [automation.name for automation in client.read_automations()]
    assert names.count(SILENT) == 1


def test_a_queue_can_be_paused(raised: Raised) -> None:
    with raised.client() as client:
        [queue] = [found for found in client.read_work_queues("gpu") if found.name == "scheduled"]
        for paused in (True, False):
            client.update_work_queue(queue.id, is_paused=paused)
            assert client.read_work_queue(queue.id).is_paused is paused


def test_the_form_knows_the_recipe(raised: Raised) -> None:
    schema = deployments(raised)["stage/train"].parameter_openapi_schema
    stored, inline = schema["properties"]["recipe"]["anyOf"]
    assert (stored["title"], inline["title"]) == ("A stored recipe", "A recipe, written here")
    assert all(told.get("description") for told in schema["properties"].values())
    train = schema["definitions"]["TrainConfig"]["properties"]
    assert train["method"]["enum"] and train["learning_rate"]["description"]
    assert train["learning_rate"]["exclusiveMinimum"] == 0
    assert schema["properties"]["stage"]["enum"][0] == "fetch"
    fields = [field for model in schema["definitions"].values() for field in model.get("properties", {}).items()]
    assert {"learning_rate", "teacher", "cache_limit"} <= {name for name, _ in fields}
    assert [name for name, told in fields if told["title"] != name or not told.get("description")] == []


@pytest.mark.full
def test_prefect_deploy_registers_the_same(raised: Raised) -> None:
    before = {name: d.model_dump(include=COMPARED) for name, d in deployments(raised).items()}
    done = subprocess.run(
        [*PREFECT, "deploy", "--all", "--prefect-file", "deployments/prefect.yaml"],
        cwd=ROOT,
        env={**os.environ, "PREFECT_API_URL": raised.url, "PWD": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: d.model_dump(include=COMPARED) for name, d in deployments(raised).items()} == before


@pytest.mark.full
def test_up_again_keeps_what_people_set(raised: Raised) -> None:
    schedule: DeploymentSchedule = deployments(raised)["retrain/scheduled"].schedules[0]
    with raised.client() as client:
        update = DeploymentScheduleUpdate(active=False, parameters={"recipe": "mine.yaml"})
        deployment = client.read_deployment_by_name("retrain/scheduled")
        client.update_deployment_schedule(deployment.id, schedule.id, **update.model_dump(exclude_unset=True))
        variables = {"env": {**deployment.job_variables["env"], "HF_TOKEN": "{{ prefect.blocks.secret.hub }}"}}
        client.update_deployment(deployment.id, DeploymentUpdate(job_variables=variables))
    before = raised.part("server")
    raised.up()
    assert raised.part("server") == before
    schedules = {s.id: s for s in deployments(raised)["retrain/scheduled"].schedules}
    assert schedules[schedule.id].parameters == {"recipe": "mine.yaml"}
    assert deployments(raised)["retrain/scheduled"].job_variables["env"] == variables["env"]


def test_status_and_memory(raised: Raised) -> None:
    told = json.loads(raised.regrow("status", "--home", str(raised.home), "--json"))
    assert told["answers"]
    assert set(told["parts"]) == {"keeper", "server", "worker-cpu", "worker-gpu-0"}
    for name in ("worker-cpu", "worker-gpu-0"):
        assert 0 < told["parts"][name]["bytes"] < 400 * 2**20


def test_the_server_listens_on_the_loopback_alone(raised: Raised) -> None:
    assert listening(raised.port) == ["127.0.0.1"]


@pytest.mark.failure(
    what="the server and a worker of `regrow up` are killed",
    outcome="the keeper starts them again over the same database",
)
def test_what_is_killed_comes_back(raised: Raised) -> None:
    was = {name: raised.kill(name) for name in ("server", "worker-cpu")}

    def back() -> bool:
        now = {name: found for name, found, _ in status(raised.home)}
        return all(now[name] not in (None, was[name]) for name in was)

    eventually(back, bool)
    eventually(lambda: running(raised.home), bool)
    assert deployments(raised), "the database is as it was"


@pytest.mark.full
@pytest.mark.failure(
    what="the keeper is killed",
    outcome="server and workers live on; the next `regrow up` takes them over",
)
def test_a_killed_keeper_is_replaced_and_takes_the_others_over(raised: Raised) -> None:
    eventually(lambda: running(raised.home), bool)
    parts = {name: raised.part(name) for name in ("server", "worker-gpu-0")}
    killed = raised.kill("keeper")
    eventually(lambda: killed.alive, lambda alive: not alive)
    assert {name: found for name, found, _ in status(raised.home)}["keeper"] is None
    assert "down" in raised.regrow("status", "--home", str(raised.home), expect=1)
    raised.regrow("up", "--home", str(raised.home))  # with the port that it had
    assert {name: raised.part(name) for name in parts} == parts


def test_what_is_up_is_not_quietly_left_as_it_was(raised: Raised) -> None:
    told = raised.regrow("up", "--home", str(raised.home), "--port", str(raised.port + 1), expect=2)
    assert f"it is up at {raised.url}" in told and "regrow down" in told


def test_two_homes_do_not_share_a_port(raised: Raised, tmp_path: Any) -> None:
    told = raised.regrow("up", "--home", str(tmp_path), "--port", str(raised.port), expect=2)
    assert f"port {raised.port}" in told and "--port" in told


def test_an_open_server_needs_a_password(raised: Raised, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    told = raised.regrow("up", "--home", str(tmp_path), "--host", "0.0.0.0", expect=2)
    assert "PREFECT_SERVER_API_AUTH_STRING" in told


def test_a_damaged_home_is_told(tmp_path: Path) -> None:
    (tmp_path / "up.json").write_text('{"settings": ')
    with pytest.raises(UserError, match=r"up\.json is damaged.*Delete it"):
        read(tmp_path)


@pytest.mark.parametrize("host", ["::1", "::", "[::1]"])
def test_an_address_of_ipv6_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--host .*IPv6 is not served"):
        up(tmp_path / "home", host=host)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("2,3", ["", "2", "3"]),
        ("GPU-8f3a, MIG-21bc", ["", "GPU-8f3a", "MIG-21bc"]),
        ("-1", ["-1", "-1"]),
    ],
)
def test_each_worker_sees_one_of_the_gpus_that_may_be_used(
    visible: str, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    write(tmp_path, State(Settings("127.0.0.1", 4200, devices(), "")))
    state = read(tmp_path)
    assert state is not None
    workers = state.settings.parts[1:]
    assert [environment(tmp_path, state.settings, worker)["CUDA_VISIBLE_DEVICES"] for worker in workers] == seen
