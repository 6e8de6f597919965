"""A recipe that really trains for a while on the workers of `regrow up`, to be hit while it does; and a look at what
is left afterwards."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from prefect.client.schemas.objects import FlowRun

from flows.processes import Process, process
from stages.gc import verify
from stages.lease import lease
from stages.runtime import Runtime
from stages.store import Store, open_store
from tests.flows.raised import Raised, eventually

MARK = "REGROW_TEST_VICTIM"

MARKED_WITHIN = 120.0
"""Seconds until a run must be marked as what it is."""


@dataclass(frozen=True)
class Victim:
    """One recipe with a store; everything its runs start carries a mark."""

    raised: Raised
    recipe: Mapping[str, Any]
    runtime: Runtime
    environment: Mapping[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid4().hex)
    direct: Mapping[str, str] = field(default_factory=dict)
    """Storage options of somebody whom the failure does not touch."""

    @cached_property
    def store(self) -> Store:
        return open_store(self.runtime.store, Path(self.runtime.cache).with_name("looking"), self.direct)

    def send(self, select: str = "+train") -> UUID:
        parameters = {"recipe": self.recipe, "select": [select], "runtime": self.runtime.model_dump(mode="json")}
        return self.raised.send("finetune/recipe", parameters, {**self.environment, MARK: self.mark})

    def trains(self, run: UUID) -> None:
        """Return when the run has a checkpoint in its store and trains on."""

        def checkpoints() -> bool:
            with self.raised.client() as client:
                state = client.read_flow_run(run).state
            assert state is not None and not state.is_final(), state
            return any(e.path.endswith("/complete.json") for e in self.store.objects.list("checkpoints/"))

        eventually(checkpoints, bool)

    def processes(self, *, holding: str = "") -> list[Process]:
        """Living processes of this victim's runs, those whose command line holds some words."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                carries = f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if carries and holding in command and (one := process(int(entry.name))):
                found.append(one)
        return sorted(found)

    def flow_process(self) -> Process:
        """The process that the worker started for the flow run."""
        return next(p for p in self.processes() if p not in self.stage_processes())

    def stage_processes(self) -> list[Process]:
        """The launcher of the stage that runs now, and what it forked."""
        return self.processes(holding="stages.child")

    def ended(self, run: UUID, since: float, record: Callable[[str, object], None] | None = None) -> FlowRun:
        """The run as it ended, marked in time and without anything left behind."""
        ended = self.raised.ended(run)
        took = time.monotonic() - since
        if record:
            record("marked_after", round(took, 1))
        assert took <= MARKED_WITHIN, f"marked {ended.state} after {took:.0f} s"
        self.left_nothing()
        return ended

    def left_nothing(self) -> None:
        """No process, no lock beyond its lease, no half artifact."""
        eventually(self.processes, lambda found: not found)
        for entry in list(self.store.objects.list("locks/")):
            _, stage, name = entry.path.split("/")
            began = time.monotonic()
            with lease(self.store, stage, name.removesuffix(".json"), 60.0, "the test"):
                assert time.monotonic() - began < self.runtime.lease_seconds + 5
        assert verify(self.store, deep=True).problems == []

    def goes_on(self) -> dict[str, Any]:
        """The next run finishes from where the last one was; the facts of its training."""
        ended = self.raised.ended(self.send())
        assert ended.state and ended.state.is_completed(), ended.state
        self.left_nothing()
        return self.trained()

    def trained(self) -> dict[str, Any]:
        [manifest] = list(self.store.objects.list("actions/train/"))
        found = self.store.objects.read(manifest.path)
        assert found is not None
        assert not list(self.store.objects.list("checkpoints/")), "dropped once the artifact is there"
        facts: dict[str, Any] = json.loads(found.data)["facts"]
        return facts


def kill(*processes: Process) -> float:
    """As a power cut would; when it was."""
    for one in processes:
        os.kill(one.pid, signal.SIGKILL)
    return time.monotonic()
