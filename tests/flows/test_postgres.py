"""`regrow up` over PostgreSQL: a real one, where the machine has it (Debian: `apt-get install postgresql`)."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.up import up
from stages.errors import UserError
from tests.flows.raised import Raised, eventually, free_port
from tests.flows.rehearsal import Rehearsal

SECRET = "a-pass-word-of-the-tests"


@dataclass(frozen=True)
class Postgres:
    """A server on the loopback, with an empty database."""

    programs: Path
    folder: Path
    port: int
    user: dict[str, Any]
    """What runs its programs as somebody who is not root, which they refuse."""

    @property
    def url(self) -> str:
        return f"postgresql://prefect:{SECRET}@127.0.0.1:{self.port}/prefect"

    def ask(self, query: str) -> list[str]:
        """Rows of an answer, fields with bars between."""
        program = [str(self.programs / "psql"), "--no-psqlrc", "--tuples-only", "--no-align", "--command", query]
        return self.run(*program, self.url).splitlines()

    def run(self, *command: str, **more: Any) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=self.folder, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.environ.get("PATH", "").split(os.pathsep))]
    programs = next((place for place in places if (place / "postgres").exists()), None)
    if programs is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    folder = tmp_path_factory.mktemp("postgres")
    user: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    if user:
        os.chown(folder, 65534, 65534)
        for above in folder.parents:  # pytest keeps its folders to the user who runs it
            if above.is_relative_to("/tmp") and above != Path("/tmp"):
                above.chmod(above.stat().st_mode | 0o711)
    made = Postgres(programs, folder, free_port(), user)
    (folder / "password").write_text(SECRET)
    (folder / "password").chmod(0o644)
    initdb = ("--pgdata=data", "--username=prefect", "--pwfile=password", "--auth=scram-sha-256", "--no-sync")
    made.run(str(programs / "initdb"), *initdb, **user)
    options = f"-c listen_addresses=127.0.0.1 -c port={made.port} -c unix_socket_directories= -c fsync=off"
    control = str(programs / "pg_ctl")
    made.run(control, "--pgdata=data", "--log=log", "--options", options, "--wait", "start", **user)
    try:
        made.run(str(programs / "createdb"), f"--maintenance-db={made.url.removesuffix('prefect')}postgres", "prefect")
        yield made
    finally:
        made.run(control, "--pgdata=data", "--mode=fast", "stop", **user)
        shutil.rmtree(folder / "data")


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_everything_is_there_and_a_run_leaves_its_states_in_postgresql(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = Raised(tmp_path / "up" / "regrow" / "prefect", free_port())
    monkeypatch.setenv("REGROW_DATABASE", postgres.url)
    try:
        said = raised.up()
        assert SECRET not in said
        assert set(postgres.ask("select name from deployment")) >= {"recipe", "scheduled", "production"}
        run = raised.send("retrain/scheduled", Rehearsal(tmp_path).ready(10))
        ended = raised.ended(run)
        assert ended.state and ended.state.is_completed(), ended.state
        assert postgres.ask(f"select state_type from flow_run where id = '{run}'") == ["COMPLETED"]
        states = postgres.ask(f"select type from flow_run_state where flow_run_id = '{run}' order by timestamp")
        assert states[-1] == "COMPLETED" and "RUNNING" in states
        assert not (raised.home / "prefect.db").exists(), "nothing went to SQLite"
    finally:
        assert "down" in raised.regrow("down", "--home", str(raised.home))
    assert "nothing was up" in raised.regrow("down", "--home", str(raised.home))
    # Clients alone: the replication launcher bears the first user's name, too.
    clients = "select count(*) from pg_stat_activity where usename = 'prefect' and backend_type = 'client backend'"
    eventually(lambda: postgres.ask(clients), lambda rows: rows == ["1"])  # who asks


def test_a_database_that_is_no_postgresql_is_told(tmp_path: Path) -> None:
    for url in ("mysql://user:password@host/prefect", "prefect"):
        with pytest.raises(UserError, match="expected postgresql://") as told:
            up(tmp_path, database=url)
        assert "password@host/prefect" not in str(told.value).partition("expected")[0]
