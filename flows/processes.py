"""Processes that outlive the command that started them: who they are, whether they live, how they end.

A process is known by its id and its start time, so that another one that got the same id later is not taken for it.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MARK = "REGROW_UP"
"""Environment variable that everything `regrow up` starts inherits, down to the last child of a run."""


class Process(NamedTuple):
    """A process of this machine."""

    pid: int
    started: str
    """The kernel's clock ticks, where it tells them."""

    @property
    def alive(self) -> bool:
        """Whether it runs (a zombie does not)."""
        return process(self.pid) == self


def process(pid: int) -> Process | None:
    """The process that has this id now, or None."""
    if sys.platform != "linux":
        try:
            os.kill(pid, 0)
        except OSError:
            return None
        return Process(pid, "")
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else Process(pid, fields[19])


def marked(home: Path) -> list[Process]:
    """Every process that carries this home's mark (Linux)."""
    wanted = f"{MARK}={home}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            carries = wanted in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or somebody else's
            continue
        if carries and int(entry.name) != os.getpid() and (one := process(int(entry.name))):
            found.append(one)
    return found


def end(processes: Iterable[Process], seconds: float) -> None:
    """Ask them to end, wait so long, then kill those that are left."""
    left = list(processes)
    for one in left:
        _signal(one, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while (left := [one for one in left if one.alive]) and time.monotonic() < deadline:
        _reap()
        time.sleep(0.05)
    for one in left:
        _signal(one, signal.SIGKILL)
    while any(one.alive for one in left):
        _reap()
        time.sleep(0.01)


def memory(one: Process) -> int:
    """Bytes of memory it holds, 0 where that cannot be told."""
    try:
        text = Path(f"/proc/{one.pid}/status").read_text()
        return 1024 * int(text.partition("VmRSS:")[2].split()[0])
    except (OSError, IndexError):
        return 0


def _signal(one: Process, number: signal.Signals) -> None:
    if one.alive:
        with suppress(ProcessLookupError):
            os.kill(one.pid, number)


def _reap() -> None:
    """Take leave of children of ours that have ended, so that they do not stay as zombies."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
