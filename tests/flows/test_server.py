"""Our own Prefect server: quiet, ended with its run however that ends, and every run's last state on record."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from flows.server import Api
from tests.flows.served import listening

FLOW = """
import sys, time
from pathlib import Path
from flows.server import serving

with serving(Path(sys.argv[1])) as api:
    from prefect import flow, task

    @task
    def work():
        print(api.url, flush=True)
        time.sleep(float(sys.argv[2]))

    @flow(name=sys.argv[3])
    def run():
        work()

    run()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def start(home: Path, seconds: float, name: str, **environment: str) -> "subprocess.Popen[str]":
    """A process in a session of its own, as from a terminal, that has a server and runs a flow."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith("PREFECT_")}
    return subprocess.Popen(
        [sys.executable, "-c", FLOW, str(home), str(seconds), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
        env=clean | environment,
    )


def is_up(url: str) -> bool:
    address = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((str(address.hostname), int(address.port or 0))) == 0


def wait_until_down(url: str) -> None:
    deadline = time.monotonic() + 30
    while is_up(url):
        assert time.monotonic() < deadline, "the server outlived its run"
        time.sleep(0.1)


def states(home: Path, flow: str) -> list[tuple[str, str]]:
    """The (flow run, task run) states of a flow, as the dashboard would show them."""
    with sqlite3.connect(home / "prefect.db") as database:
        return database.execute(
            "select r.state_type, t.state_type from flow f join flow_run r on r.flow_id = f.id "
            "join task_run t on t.flow_run_id = r.id where f.name = ?",
            (flow,),
        ).fetchall()


@pytest.mark.full
def test_two_runs_at_once_show_nothing_of_prefect_and_leave_their_states(home: Path) -> None:
    """Their servers would ask for one port, and set up one database."""
    both = [start(home, 0, name) for name in ("one", "two")]
    told = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [err for _, err in told] == ["", ""]
    urls = [out.strip() for out, _ in told]
    assert len({*urls}) == 2
    assert not any(is_up(url) for url in urls)
    assert [states(home, name) for name in ("one", "two")] == [[("COMPLETED", "COMPLETED")]] * 2


@pytest.mark.full
@pytest.mark.failure(
    what="Ctrl-C",
    outcome="the run is marked *Crashed* before its server ends",
)
def test_ctrl_c_ends_the_server_after_the_run_was_recorded(home: Path) -> None:
    process = start(home, 300, "interrupted")
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Error" not in err.replace("KeyboardInterrupt", "")
    assert not is_up(url)
    assert states(home, "interrupted") == [("CRASHED", "CRASHED")]


@pytest.mark.failure(
    what="`regrow run` without `regrow up` is killed",
    outcome="its own server ends with it",
)
def test_a_killed_run_takes_its_server_along(home: Path) -> None:
    process = start(home, 300, "killed")
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert is_up(url)
    process.kill()
    process.communicate()
    wait_until_down(url)


def test_a_configured_api_is_used_as_it_is(prefect_api: Api, tmp_path: Path) -> None:
    process = start(tmp_path / "unused", 0, "elsewhere", PREFECT_API_URL=prefect_api.url)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.strip() == prefect_api.url
    assert not (tmp_path / "unused").exists()


def test_the_line_that_tells_how_to_see_a_run_can_be_pasted(tmp_path: Path) -> None:
    line = Api("http://127.0.0.1:4200/api", tmp_path / "a home").where("1234")
    command, _, address = line.partition(", then ")
    shown = subprocess.run(
        ["sh", "-c", command.replace("prefect server start", "printenv PREFECT_HOME")], capture_output=True, text=True
    )
    assert shown.stdout.strip() == str(tmp_path / "a home")
    assert address == "http://127.0.0.1:4200/v2/runs/flow-run/1234"


def test_pages_of_other_sites_may_not_use_the_api(prefect_api: Api) -> None:
    base = prefect_api.url.removesuffix("/api")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    allowed = {}
    for origin in (base, base.replace("127.0.0.1", "localhost"), "https://example.com"):
        told = httpx.options(f"{prefect_api.url}/flow_runs/", headers={"Origin": origin, **asked})
        allowed[origin] = told.headers.get("access-control-allow-origin")
    assert list(allowed.values()) == [*list(allowed)[:2], None]


def test_the_server_listens_on_the_loopback_alone(prefect_api: Api) -> None:
    port = int(prefect_api.url.rpartition(":")[2].partition("/")[0])
    assert listening(port) == ["127.0.0.1"]
