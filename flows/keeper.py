"""The keeper: the one process behind `regrow up`. Starts the server and the workers and starts again what ends.

`python -m flows.keeper HOME` reads `HOME/up.json` and holds `HOME/keeper.lock` while it lives. When it is killed, its
parts live on, and the next keeper takes them over. SIGTERM ends everything in order: workers, runs (which save their
state), server.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows.processes import MARK, Process, end, marked, process
from flows.server import server_settings
from stages.errors import UserError

LOOK_SECONDS = 1.0
"""Between two looks at the parts."""

PATIENCE_SECONDS = 60.0
"""How long runs may take to save their state when all goes down."""

HEALTHY_SECONDS = 20.0
"""A part that ends sooner than this after its start is started again ever more slowly."""

LONGEST_PAUSE = 30.0
"""Between two starts of a part that keeps ending."""


CLIENT_RETRIES = "7"
"""Pauses of 2, 4, … 128 s while the server is away: a run outlives its restart on a busy machine too."""


@dataclass(frozen=True)
class Settings:
    """What `regrow up` was asked for."""

    host: str
    port: int
    devices: list[str]
    """GPUs, as `CUDA_VISIBLE_DEVICES` names them; none where there is none, and one worker for the pool `gpu` computes
    on the CPU."""
    folder: str
    """Where `regrow up` was called: relative paths of recipes start there."""
    database: str = ""
    """A PostgreSQL URL, or empty for SQLite in the home."""

    @property
    def api(self) -> str:
        """The server's REST API, as this machine reaches it."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}/api"

    @property
    def parts(self) -> list[str]:
        """The server, then the workers."""
        return ["server", "worker-cpu", *(f"worker-gpu-{n}" for n in range(max(1, len(self.devices))))]


@dataclass(frozen=True)
class State:
    """`up.json`: the settings, and the processes as they were when it was last written."""

    settings: Settings
    keeper: Process | None = None
    parts: Mapping[str, Process] = field(default_factory=dict)


def read(home: Path) -> State | None:
    """The state of a home, or None when nothing was ever brought up there. Raises UserError when it is damaged."""
    try:
        told: dict[str, Any] = json.loads((home / "up.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(
            f"{home / 'up.json'} is damaged: it is no JSON document. Delete it; then `regrow down` ends what runs "
            "there, and `regrow up` starts anew"
        ) from None
    keeper = Process(*told["keeper"]) if told["keeper"] else None
    if isinstance(counted := told["settings"]["devices"], int):  # by a version that did not name them
        told["settings"]["devices"] = [str(n) for n in range(counted)]
    return State(Settings(**told["settings"]), keeper, {name: Process(*p) for name, p in told["parts"].items()})


def write(home: Path, state: State) -> None:
    """Replace the state. For the owner's eyes: a database URL may hold a password."""
    aside = home / f"up.json.{os.getpid()}"
    aside.touch(mode=0o600)
    aside.write_text(json.dumps(asdict(state), indent=1))
    aside.replace(home / "up.json")


def healthy(settings: Settings) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"{settings.api}/health", timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError, OSError):
        return False


def environment(home: Path, settings: Settings, part: str) -> dict[str, str]:
    """A part's environment: this one's, without what points clients elsewhere."""
    theirs = ("PREFECT_API_URL", "PREFECT_PROFILE", *(n for n in os.environ if n.startswith("PREFECT_LOGGING_")))
    found = {name: value for name, value in os.environ.items() if name not in theirs}
    found |= {MARK: str(home), "PREFECT_HOME": str(home), "DO_NOT_TRACK": "1"}
    if part == "server":
        found |= server_settings(settings.host, settings.port)
        found |= {"PREFECT_SERVER_DATABASE_CONNECTION_URL": settings.database} if settings.database else {}
        return found
    found |= {"PREFECT_API_URL": settings.api, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    found.setdefault("PREFECT_CLIENT_MAX_RETRIES", CLIENT_RETRIES)
    if settings.devices:
        found["CUDA_VISIBLE_DEVICES"] = ""
        if part != "worker-cpu":
            found["CUDA_VISIBLE_DEVICES"] = settings.devices[int(part.removeprefix("worker-gpu-"))]
    return found


def command(part: str) -> list[str]:
    """How a part is started."""
    if part == "server":
        return [sys.executable, "-m", "flows.database"]
    pool = "cpu" if part == "worker-cpu" else "gpu"
    limit = [] if pool == "cpu" else ["--limit", "1"]
    return [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", part, *limit]


@dataclass
class _Kept:
    """A part that is looked after."""

    process: Process | None = None
    child: "subprocess.Popen[bytes] | None" = None
    """Where it is a child of this keeper and not one of an earlier keeper."""
    began: float = 0.0
    pause: float = 0.0

    @property
    def alive(self) -> bool:
        if self.child is not None:
            self.child.poll()  # takes leave of it when it has ended
        return self.process is not None and self.process.alive


def keep(home: Path, stop: threading.Event) -> None:
    """Look after the parts until told to stop; then end them."""
    state = read(home)
    assert state is not None, f"{home}/up.json is written by `regrow up`"
    settings = state.settings
    kept = {name: _Kept(state.parts.get(name)) for name in settings.parts}
    me = process(os.getpid())
    while not stop.is_set():
        for name, part in kept.items():
            if not part.alive and _may_start(name, part, settings):
                _start(home, settings, name, part)
        parts = {name: part.process for name, part in kept.items() if part.process and part.alive}
        now = State(settings, me, parts)
        if now != state:
            write(home, now)
            state = now
        stop.wait(LOOK_SECONDS)
    end_all(home)


def _may_start(name: str, part: _Kept, settings: Settings) -> bool:
    lived = time.monotonic() - part.began
    if part.began and lived < part.pause:
        return False
    part.pause = min(LONGEST_PAUSE, 2 * part.pause or 1.0) if lived < HEALTHY_SECONDS + part.pause else 0.0
    return name == "server" or healthy(settings)


def _start(home: Path, settings: Settings, name: str, part: _Kept) -> None:
    with (home / f"{name}.log").open("ab") as log:
        part.child = subprocess.Popen(
            command(name),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=settings.folder,
            env=environment(home, settings, name),
        )
    part.process, part.began = process(part.child.pid), time.monotonic()


def end_all(home: Path) -> None:
    """End whatever of this home runs: workers first, so that nothing new begins; then runs; then the server."""
    state = read(home)
    parts = state.parts if state else {}
    end([p for name, p in parts.items() if name != "server"], 10.0)
    server = parts.get("server")
    end([p for p in marked(home) if p != server and (state is None or p != state.keeper)], PATIENCE_SECONDS)
    end([server] if server else [], 10.0)
    end(marked(home), 5.0)
    if state:
        write(home, State(state.settings))


def main(home: Path) -> None:
    """Be the keeper of a home, unless it has one."""
    with (home / "keeper.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        signal.signal(signal.SIGINT, lambda *_: stop.set())
        keep(home, stop)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
