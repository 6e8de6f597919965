"""A recipe by the name that it ran under: which run's it is, and what is said of that."""

from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

from flows.recipe import load
from flows.run import start
from flows.server import Api, reporting_to
from flows.stored import recipe_of
from stages.errors import UserError
from tests.flows.rehearsal import Rehearsal


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path)


def trial(rehearsal: Rehearsal, right: int) -> None:
    """A run that stops before publish."""
    run = rehearsal.make(rehearsal.start(right), until="evaluate")
    run.record("finished")
    run.become_baseline()


def whole(rehearsal: Rehearsal, right: int, *settings: str) -> str:
    """A run of everything, with settings beside its file; its id."""
    asked = rehearsal.start(right)
    (rehearsal.folder / "bot.yaml").write_text(asked.loaded.text)
    run = rehearsal.make(start(load(rehearsal.folder / "bot.yaml", settings), asked.runtime, asked.store))
    run.record("finished")
    run.become_baseline()
    return run.id


def test_a_name_is_the_last_whole_run_and_no_trial(rehearsal: Rehearsal) -> None:
    with pytest.raises(UserError, match="no recipe of that name ran"):
        recipe_of("bot", (), rehearsal.store)
    trial(rehearsal, 5)
    with pytest.raises(UserError, match=r"recipe `bot`: only some of its stages ran .* run it to its end once"):
        recipe_of("bot", (), rehearsal.store)
    first = whole(rehearsal, 20)
    trial(rehearsal, 6)
    found = recipe_of("bot", (), rehearsal.store)
    assert (found.recipe.train.seed, found.run) == (20, first)
    second = whole(rehearsal, 21)
    assert recipe_of("bot", (), rehearsal.store).run == second
    assert rehearsal.store.read_ref("bot/last").document["run"] == second  # type: ignore[union-attr]


def test_the_settings_that_a_name_brings_along_are_known(rehearsal: Rehearsal) -> None:
    whole(rehearsal, 20, "train.epochs=2")
    found = recipe_of("bot", ["train.warmup=0.1"], rehearsal.store)
    assert (found.recipe.train.epochs, found.recipe.train.warmup) == (2, 0.1)
    assert found.settings == ("train.epochs=2", "train.warmup=0.1")
    assert recipe_of(str(rehearsal.folder / "bot.yaml"), (), rehearsal.store).recipe.train.epochs == 1


def test_a_schedule_says_whose_recipe_it_took(rehearsal: Rehearsal, prefect_api: Api) -> None:
    from flows.retrain import retrain

    run = whole(rehearsal, 20, "train.epochs=2")
    runtime = rehearsal.start(20).runtime
    with reporting_to(prefect_api):
        state = retrain("bot", runtime=runtime, return_state=True)
    assert state.is_completed(), state
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with reporting_to(prefect_api), get_client(sync_client=True) as client:  # after what was held back is delivered
        told = [entry.message for entry in client.read_logs(chosen)]
    assert f"the recipe bot is that of run {run}, with train.epochs=2" in told
