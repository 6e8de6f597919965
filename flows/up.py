"""`regrow up`, `down` and `status`: a Prefect server of one's own with its workers, kept running (`flows.keeper`).

All state is in one folder, the home: database, logs, settings. Only `up` imports Prefect, to register the deployments.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from flows.keeper import Settings, State, end_all, healthy, read, write
from flows.processes import Process, end, marked, memory, process
from flows.server import PORT, PROFILE, START_SECONDS
from stages.child import ALONE
from stages.errors import UserError
from stages.home import expanded
from stages.runtime import default_home


def home_of(folder: Path | None) -> Path:
    """The home that was asked for, or the usual one: the same that a run's own server uses."""
    return expanded(folder or default_home() / "prefect", "home").absolute()


def devices() -> list[str]:
    """GPUs of this machine that may be used: numbers or UUIDs, as `CUDA_VISIBLE_DEVICES` has them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in map(str.strip, visible.split(",")) if name not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(n) for n in range(sum(line.startswith("GPU ") for line in told.splitlines()))]


def up(home: Path, port: int | None = None, host: str | None = None, database: str | None = None) -> Settings:
    """Bring everything up, or what is missing of it, and register the deployments. Returns when runs can be sent.

    What is None is as the home had it last: after a reboot the same server is up again, with the same database. Raises
    UserError when it is up and other than asked for, when the port is taken, when the host is an address of IPv6, when
    the server would be open to a network without a password, when the database is no PostgreSQL, and when the server
    does not start.
    """
    state = read(home)
    last = state.settings if state else Settings("127.0.0.1", PORT, [], "")
    port, host = port or last.port, host or last.host
    database = last.database if database is None else _async_url(database)
    if state and kept(state) and (host, port, database) != (last.host, last.port, last.database):
        raise UserError(f"it is up at {last.api}, and not as asked for now: `regrow down` first")
    if ":" in host:
        raise UserError(f"--host {host}: expected a name or an address of IPv4, such as 127.0.0.1; IPv6 is not served")
    if host not in ("127.0.0.1", "localhost") and not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise UserError(
            f"--host {host}: other machines could start runs here; set PREFECT_SERVER_API_AUTH_STRING=user:password "
            "(and PREFECT_API_AUTH_STRING for those who use it)"
        )
    started = state is None or not kept(state)
    if started:
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "profiles.toml").exists():
            (home / "profiles.toml").write_text(PROFILE)
        settings = Settings(host, port, devices(), str(Path.cwd()), database)
        parts = state.parts if state else {}
        if state and parts and replace(state.settings, folder="") != replace(settings, folder=""):
            end_all(home)  # left by a keeper that was killed, and now asked for otherwise
            parts = {}
        if not any(part.alive for part in parts.values()):
            _check_free(settings)
        write(home, State(settings, None, parts))
        _start_keeper(home)
    state = read(home)
    assert state is not None
    _register(home, state.settings)
    if started and state.settings.host in ("127.0.0.1", "localhost"):  # else workers may be on other machines
        from flows.deployments import mark_lost

        mark_lost([one.pid for one in marked(home)])
    return state.settings


def down(home: Path) -> bool:
    """End everything of a home; False when nothing ran. Runs save their state where they can."""
    state = read(home)
    known = [] if state is None else [state.keeper, *state.parts.values()]
    if not marked(home) and not any(one and one.alive for one in known):  # a run may outlive all that started it
        return False
    if state and state.keeper and state.keeper.alive:
        end([state.keeper], 90.0)
    end_all(home)
    return True


def kept(state: State) -> bool:
    """Whether a keeper lives."""
    return state.keeper is not None and state.keeper.alive


def status(home: Path) -> list[tuple[str, Process | None, int]]:
    """Each part with its process, None when it is down, and its memory in bytes. Empty when nothing was ever up."""
    state = read(home)
    if state is None:
        return []
    parts = {"keeper": state.keeper, **{name: state.parts.get(name) for name in state.settings.parts}}
    return [
        (name, found if found and found.alive else None, memory(found) if found and found.alive else 0)
        for name, found in parts.items()
    ]


def running(home: Path) -> str | None:
    """The API of the server that `regrow up` keeps there, if it answers."""
    state = read(home)
    return state.settings.api if state and kept(state) and healthy(state.settings) else None


def _start_keeper(home: Path) -> None:
    with (home / "keeper.log").open("ab") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "flows.keeper", str(home)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **ALONE},  # which all parts and the runs that they start inherit
        )
    deadline = time.monotonic() + 20
    while (state := read(home)) is None or state.keeper != process(keeper.pid):
        if keeper.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"the keeper did not start; its log: {home / 'keeper.log'}")
        time.sleep(0.02)


def _register(home: Path, settings: Settings) -> None:
    """Wait for the server and register the deployments; Prefect is imported while it starts."""
    os.environ |= {"PREFECT_API_URL": settings.api, "PREFECT_HOME": str(home)}
    from flows.deployments import register

    deadline = time.monotonic() + START_SECONDS
    while not healthy(settings):
        if time.monotonic() > deadline:
            raise UserError(f"the server did not start within {START_SECONDS:.0f} s; its log: {home / 'server.log'}")
        time.sleep(0.1)
    register(Path(settings.folder), len(settings.devices))


def _async_url(database: str) -> str:
    """The database's URL as the server wants it, with the driver that it has."""
    scheme, separator, rest = database.partition("://")
    if not database:
        return ""
    if not separator or scheme not in ("postgresql", "postgres", "postgresql+asyncpg"):
        raise UserError("--database (REGROW_DATABASE): expected postgresql://user:password@host/name")
    return f"postgresql+asyncpg://{rest}"


def _check_free(settings: Settings) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise UserError(
                f"port {settings.port} on {settings.host} is taken ({error.strerror}): end what uses it, or choose "
                "another with --port"
            ) from None
