"""A model that is served by the real command, for as long as a block runs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.conftest import free_ports


@contextmanager
def serving(words: Sequence[str], home: Path, url: str = "http://127.0.0.1") -> Iterator[int]:
    """`regrow WORDS` with a port that is free, answering at `url`; what it prints is in `home`/served.log."""
    port, log = free_ports(1)[0], home / "served.log"
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("PREFECT_", "REGROW_"))}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *words, "--port", str(port)],
            env={**clean, "XDG_DATA_HOME": str(home), "REGROW_DEVICE": "cpu", "HF_HOME": str(home / "hub")},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + 400
    try:
        while not _answers(f"{url}:{port}"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) in (0, -signal.SIGTERM), "it ends as its server does"


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def listening(port: int) -> list[str]:
    """The addresses at which some process of this machine listens on a port."""
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            address, _, digits = line.split()[1].rpartition(":")
            if line.split()[3] == "0A" and int(digits, 16) == port:
                octets = bytes.fromhex(address)[::-1]
                found.append(".".join(map(str, octets)) if name == "tcp" else address)
    return found
