"""Who comes first when the GPU is taken: people before schedules, whoever asked earlier."""

from pathlib import Path

import pytest

from stages.runtime import Runtime
from tests.flows.conftest import tiny_recipe
from tests.flows.raised import Raised
from tests.flows.rehearsal import Rehearsal
from tests.flows.victim import Victim


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_person_s_run_overtakes_a_scheduled_one(raised: Raised, tmp_path: Path, tiny_model: Path) -> None:
    recipe = tiny_recipe(tmp_path, tiny_model)
    recipe["train"]["epochs"] = 12
    runtime = Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache", save_seconds=0.5)
    victim = Victim(raised, recipe, runtime)
    first = victim.send()
    victim.trains(first)  # so that the GPU's one place is taken
    folders = [tmp_path / name for name in ("nightly", "person")]
    for folder in folders:
        folder.mkdir()
    nightly, person = (Rehearsal(folder, name=folder.name).ready(20) for folder in folders)
    scheduled = raised.send("retrain/scheduled", nightly)
    interactive = raised.send("finetune/recipe", person)
    ended = [raised.ended(run) for run in (first, interactive, scheduled)]
    assert all(run.state and run.state.is_completed() for run in ended), [run.state for run in ended]
    began = [run.start_time for run in ended if run.start_time]
    assert len(began) == 3 and began == sorted(began)
