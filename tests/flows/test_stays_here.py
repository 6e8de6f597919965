"""What `regrow up` and a run leave on a machine, and whom they talk to."""

import os
from pathlib import Path

import pytest

from tests.flows.raised import Raised, free_port
from tests.flows.rehearsal import Rehearsal
from tests.flows.watched import Connections


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_state_is_in_one_folder_and_nobody_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)  # of the tests' own
    for name in [name for name in os.environ if name.startswith(("XDG_", "HF_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "user").mkdir()
    data = tmp_path / "data"
    raised = Raised(data / "regrow" / "prefect", free_port(), {"HOME": str(tmp_path / "user")})
    rehearsal = Rehearsal(tmp_path / "work")
    rehearsal.folder.mkdir()
    with Connections(f"XDG_DATA_HOME={data}") as connections:
        try:
            raised.regrow("up", "--port", str(raised.port))
            state = raised.ended(raised.send("finetune/recipe", rehearsal.ready(20))).state
            assert state and state.is_completed(), state
        finally:
            raised.regrow("down")
    assert connections.seen and not [str(other) for other in connections.seen if not other.is_loopback]
    assert (raised.home / "prefect.db").exists()
    assert list(files(tmp_path / "user")) == []
    assert [path for path in files(data) if not path.startswith("regrow/")] == []


def files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
