"""The Prefect API that a run reports to: the configured one, else a server of its own for as long as the run takes.

    with serving() as api:
        from flows.finetune import finetune
        ...
        print(api.where(flow_run_id))

Prefect's own stand-in for a missing server has no dashboard, gets the Ctrl-C that was meant for the run (which then
stays "Running" for ever) and outlives a killed run. The ordinary `prefect server start` costs the same seconds; here
it runs in a session of its own and the kernel ends it with this process. Its database stays in the user's data
directory, so that `prefect server start` with the printed `PREFECT_HOME` shows every run again.

`python -m flows.server PARENT` is that server's first moment; nothing else runs this module.
"""

import ctypes
import fcntl
import importlib
import importlib.metadata
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

from stages.child import ALONE, PR_SET_PDEATHSIG
from stages.errors import UserError
from stages.runtime import default_home

PORT = 4200
"""Prefect's usual port, so that a page opened during a run is found again later; another one when it is taken."""

PAGE = "/v2/runs/flow-run/"
"""Where a local dashboard shows a flow run."""

START_SECONDS = 150.0
"""How long the server may take to start. Usually 4 s, 9 s with a new database, more on a busy machine."""

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL",
    # A server that somebody has up takes a run that is silent for 90 s for dead (`flows.deployments`).
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}
"""Prefect in this process: log to the API, say on the terminal nothing, and often that we live. The user's own wins."""

PROFILE = """\
active = "regrow"

[profiles.regrow]
PREFECT_SERVER_ANALYTICS_ENABLED = "false"
PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT = "false"
"""
"""The settings of a server started in our home, by us or by the user."""


@dataclass(frozen=True)
class Api:
    """Where runs are reported to."""

    url: str
    """The REST API, ending in `/api`."""
    home: Path | None
    """The server's own `PREFECT_HOME`, or None when somebody else's API is used."""

    def page(self, flow_run: UUID | str) -> str:
        """The run's page in the dashboard; of our own server, there while this process runs."""
        if self.home is not None:
            return f"{self.url.removesuffix('/api')}{PAGE}{flow_run}"
        from prefect.utilities.urls import url_for

        return url_for("flow-run", flow_run) or self.url

    def where(self, flow_run: UUID | str) -> str:
        """The one line that tells how to see a finished run."""
        if self.home is None:
            return self.page(flow_run)
        home = str(self.home).replace(str(Path.home()), "~", 1)
        quoted = home if home.startswith("~") and " " not in home else shlex.quote(str(self.home))
        return f"PREFECT_HOME={quoted} prefect server start, then http://127.0.0.1:{PORT}{PAGE}{flow_run}"


@contextmanager
def serving(home: Path | None = None) -> Iterator[Api]:
    """Have a Prefect API: `PREFECT_API_URL` or a profile's when there is one, else a server of our own.

    Prefect must not have been imported yet: it sets up its logging then. Raises UserError when the server does not
    start, naming its log, and when the configured one cannot be used.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from prefect.settings import get_current_settings

    from flows.up import running

    usual = home or default_home() / "prefect"
    if configured := get_current_settings().api.url:
        require_usable(configured)
        yield Api(configured, None)
    elif url := running(usual):
        with reporting_to(Api(url, None)) as api:
            yield api
    else:
        with own_server(usual) as api, reporting_to(api):
            yield api


def require_usable(url: str) -> None:
    """Raise UserError when the configured API, at `url`, is down, of another major version, or wants a password."""
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.raise_for_api_version_mismatch()
            client.read_flows(limit=1)
    except (httpx.HTTPError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code in (401, 403):
            why = "wants a password: set PREFECT_API_AUTH_STRING=user:password, or PREFECT_API_KEY for Prefect Cloud"
        else:
            told = str(cause).partition("\n")[0]
            why = f"cannot be used ({told}): start one of this version there, mend the URL, or unset the variable"
        shown = urlsplit(url)._replace(netloc=urlsplit(url).netloc.rpartition("@")[2]).geturl()
        raise UserError(f"PREFECT_API_URL: the Prefect server {shown} {why}") from None


@contextmanager
def reporting_to(api: Api) -> Iterator[Api]:
    """Let flows of this process report to `api`, and deliver what they hold back at the end."""
    from prefect.context import refresh_global_settings_context
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogHandler

    # In the environment, because a setting in a context variable would not reach other threads.
    before = {name: value for name, value in os.environ.items() if name == "PREFECT_API_URL"}
    os.environ["PREFECT_API_URL"] = api.url
    refresh_global_settings_context()
    try:
        yield api
    finally:
        EventsWorker.drain_all(timeout=10)  # task states travel as events
        APILogHandler().flush()
        del os.environ["PREFECT_API_URL"]
        os.environ.update(before)
        refresh_global_settings_context()


@contextmanager
def own_server(home: Path, port: int = PORT) -> Iterator[Api]:
    """A server process on this machine's loopback interface, on `port` if it is free, ended when the block is left."""
    home.mkdir(parents=True, exist_ok=True)
    profiles = home / "profiles.toml"
    if not profiles.exists():
        profiles.write_text(PROFILE)
    with _reserved(port) as ours:
        api = Api(f"http://127.0.0.1:{ours}/api", home)
        process = _started(api, home, ours)
        try:
            yield api
        finally:
            _end(process)


def _started(api: Api, home: Path, port: int) -> "subprocess.Popen[bytes]":
    """The server's process, healthy. Two that set up one database at once break it: only the first may start alone."""
    marker, version = home / "database-of", importlib.metadata.version("prefect")
    with (home / "starting.lock").open("w") as lock, (home / "server.log").open("ab") as log:
        if not marker.exists() or marker.read_text() != version:
            fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_server_environment(home, port),
        )
        try:
            importlib.import_module("prefect.flow_engine")  # seconds as well, so meanwhile
            _wait_until_healthy(process, api, home / "server.log")
        except BaseException:
            _end(process)
            raise
        marker.write_text(version)
    return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def server_settings(host: str, port: int) -> dict[str, str]:
    """Where a server listens and whose pages may talk to it. By settings, not by flags: the dashboard's pages learn the
    port from the settings alone."""
    own = ",".join(dict.fromkeys(f"http://{name}:{port}" for name in (host, "127.0.0.1", "localhost")))
    return {
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        # The dashboard's pages call where they came from: the host's own name may be one that no browser can reach.
        "PREFECT_SERVER_UI_API_URL": os.environ.get("PREFECT_SERVER_UI_API_URL", "/api"),
        # Prefect lets pages of any site use its API: one that a person happens to visit could start runs here.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": os.environ.get("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", own),
    }


def _server_environment(home: Path, port: int) -> dict[str, str]:
    """This process's environment without what the user set for clients: another API, a profile, logging."""
    theirs = ("PREFECT_API_URL", "PREFECT_PROFILE", *(n for n in os.environ if n.startswith("PREFECT_LOGGING_")))
    return {
        **{name: value for name, value in os.environ.items() if name not in theirs},
        **ALONE,
        "PREFECT_HOME": str(home),
        **server_settings("127.0.0.1", port),
    }


def _wait_until_healthy(process: "subprocess.Popen[bytes]", api: Api, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{api.url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.05)
    how = f"within {START_SECONDS:.0f} s" if process.poll() is None else f"and ended with exit code {process.poll()}"
    raise UserError(f"Prefect's server did not start {how}; its log: {log}")


@contextmanager
def _reserved(wanted: int) -> Iterator[int]:
    """A port that is ours: the wanted one, or any other when somebody has it or had it a moment ago.

    The socket stays bound but does not listen. Set after binding, SO_REUSEADDR lets the server bind beside it; anybody
    else who reserves this way is refused, so two runs that start at once do not end up with one server.
    """
    with socket.socket() as reservation:
        try:
            reservation.bind(("127.0.0.1", wanted))
        except OSError:
            reservation.bind(("127.0.0.1", 0))
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield int(reservation.getsockname()[1])


def _become_server(parent: int) -> None:
    """Turn this process into Prefect's server, to be ended by the kernel (Linux) when the parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == parent:
        os.execv(sys.executable, [sys.executable, "-m", "flows.database"])


if __name__ == "__main__":
    _become_server(int(sys.argv[1]))
