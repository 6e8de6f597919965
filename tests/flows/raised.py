"""What `regrow up` brought up, for tests: the real command in processes of its own, and a client of its server."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.keeper import healthy, read
from flows.processes import Process

PATIENCE = 900.0
"""Seconds on a busy machine."""


@dataclass(frozen=True)
class Raised:
    """One home with its server and workers."""

    home: Path
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """What its command has beside this process's environment."""

    @property
    def store(self) -> str:
        """The store that its workers use when a run does not say otherwise."""
        return str(self.home.parent / "store")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def answers(self) -> bool:
        """Whether its server can be asked."""
        state = read(self.home)
        return state is not None and healthy(state.settings)

    def regrow(self, *arguments: str, expect: int = 0) -> str:
        """The command in a process of its own; its output."""
        clean = {n: v for n, v in os.environ.items() if not n.startswith(("PREFECT_", "REGROW_UP"))}
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            env={**clean, "COLUMNS": "80", "XDG_DATA_HOME": str(self.home.parents[1]), **self.environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def up(self) -> str:
        return self.regrow("up", "--home", str(self.home), "--port", str(self.port))

    def part(self, name: str) -> Process:
        state = read(self.home)
        assert state is not None
        found = state.keeper if name == "keeper" else state.parts.get(name)
        assert found is not None, name
        return found

    def kill(self, name: str) -> Process:
        """As a power cut would; the process that was."""
        found = self.part(name)
        os.kill(found.pid, signal.SIGKILL)
        return found

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        with temporary_settings({PREFECT_API_URL: self.url}), get_client(sync_client=True) as client:
            yield client

    def send(
        self, deployment: str, parameters: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> UUID:
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            variables = {"env": {**found.job_variables["env"], **environment}} if environment else None
            return client.create_flow_run_from_deployment(
                found.id, parameters=dict(parameters), job_variables=variables
            ).id

    def wait(self, run: UUID, until: Callable[[FlowRun], bool]) -> FlowRun:
        """The run as soon as it is so."""
        with self.client() as client:
            return eventually(lambda: client.read_flow_run(run), until)

    def ended(self, run: UUID) -> FlowRun:
        return self.wait(run, lambda found: found.state is not None and found.state.is_final())


def eventually(look: Callable[[], Any], until: Callable[[Any], bool]) -> Any:
    """What `look` gives as soon as it is as wanted."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = look()
        if until(found):
            return found
        assert time.monotonic() < deadline, f"still {found!r}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
