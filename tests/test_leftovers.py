"""A test run that leaves something behind fails and names it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leftovers import MARK

LEAVING = """
import subprocess, tempfile
from pathlib import Path

def test_it():
    Path(tempfile.mkdtemp(prefix="forgotten-")).joinpath("x").touch()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    print("number", subprocess.Popen(["sleep", "600"], start_new_session=True, **silent).pid)
"""


@pytest.mark.full
def test_what_is_left_behind_is_named(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.leftovers import pytest_configure, pytest_sessionfinish\n")
    (tmp_path / "test_it.py").write_text(LEAVING)
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-q", str(tmp_path), f"--rootdir={tmp_path}"],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    os.kill(int(done.stdout.partition("number ")[2].split()[0]), signal.SIGKILL)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "sleep 600" in done.stdout and "file forgotten-" in done.stdout
