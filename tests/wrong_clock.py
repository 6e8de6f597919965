"""A process, and all that it starts, on a machine whose clock is wrong: by libfaketime, where that is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

SLEEP = """\
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    return syscall(SYS_clock_nanosleep, clock, flags, until, left) ? errno : 0;
}
"""
"""Sleeping by the monotonic clock, which libfaketime 0.9.10 gets wrong where it is told to leave that clock alone."""


def wrong_clock(by: str, folder: Path) -> dict[str, str]:
    """The variables that set the clock of a process wrong by `+2y` or `-2y`; what that needs is compiled in `folder`.

    Nobody sets a monotonic clock, and when a file was written is told by who has the disk: both stay right.
    """
    found, compiler = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), shutil.which("cc")
    if not found or compiler is None:
        pytest.skip("needs libfaketime and a C compiler: apt-get install libfaketime gcc")
    sleep = folder / "sleep.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(sleep), "-x", "c", "-"], input=SLEEP, text=True, check=True, timeout=60
    )
    return {
        "LD_PRELOAD": f"{sleep}:{found[0]}",
        "FAKETIME": by,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }
