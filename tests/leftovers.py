"""Hooks that `conftest.py` takes in: the tests leave no process and no folder behind.

Every process that a test starts inherits a mark in its environment; who still carries it when the session is over was
left behind. Temporary files go to a folder of the session's own, which must be empty then, and so does what would go to
the user's data directory (a store, a cache). The run fails naming both.
(Linux only: it reads /proc.)
"""

import getpass
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

MARK = "REGROW_TEST_SESSION"
PATIENCE = 15.0
"""Seconds that processes which have been told to end get for it."""

DATA = "data"
"""Stands for the user's data directory: no test reads or writes the real one."""

KEPT = ("pytest-of-", "torchinductor_", "runner_storage", "prefect-workspace-", DATA)
"""What tools keep: pytest its last runs' folders, torch what it has compiled, Prefect's workers what they ran in."""
COMPILERS = "torch/_inductor/compile_worker"
"""Torch's helpers that compile for a GPU: they end with the process that started them."""


def pytest_configure(config: pytest.Config) -> None:
    if sys.platform != "linux" or MARK in os.environ:  # an xdist worker: its controller looks
        return
    folder = tempfile.mkdtemp(prefix="regrow-tests-")
    os.environ[MARK] = str(os.getpid())
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.environ["XDG_DATA_HOME"] = str(Path(folder) / DATA)
    config.stash[_FOLDER] = Path(folder)


_FOLDER = pytest.StashKey[Path]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    folder = session.config.stash.get(_FOLDER, None)
    if folder is None:
        return
    deadline = time.monotonic() + PATIENCE
    while (left := _processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    kept = (*KEPT, getpass.getuser())  # flash-attn's compiled kernels are in a folder of the user's name
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith(kept))
    told = [f"process {number}: {command}" for number, command in left.items()] + [f"file {name}" for name in files]
    if told and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nleft behind by the tests:", *told, sep="\n  ")
    if session.exitstatus == 0:
        shutil.rmtree(folder, ignore_errors=True)


def _processes() -> dict[int, str]:
    """Processes with the mark, this one and the dead apart, by number."""
    mark = f"{MARK}={os.getpid()}".encode()
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and int(place.name) != os.getpid():
            try:
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if COMPILERS not in command:
                        found[int(place.name)] = command[:120]
            except OSError:  # it has ended, or is not ours
                continue
    return found
