"""Runs on the workers of `regrow up` over a bucket that fails while they train: its server, its keys, its network."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.runtime import Runtime
from tests.conftest import S3, SeaweedFS
from tests.flows.conftest import tiny_recipe
from tests.flows.raised import Raised, eventually
from tests.flows.victim import Victim

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

Record = Callable[[str, object], None]

WORKER = ("granted-key", "granted-secret-granted-secret")
"""Not one of those that the server's configuration names: they can be neither granted nor revoked."""


@pytest.fixture
def server(s3_server_of_ones_own: tuple[SeaweedFS, S3]) -> SeaweedFS:
    return s3_server_of_ones_own[0]


@pytest.fixture
def make_victim(
    raised: Raised, tmp_path: Path, tiny_model: Path, s3_server_of_ones_own: tuple[SeaweedFS, S3]
) -> Callable[..., Victim]:
    """A victim whose store is the bucket; its runs have the worker's key, the test looks with the admin's."""
    server, s3 = s3_server_of_ones_own

    def make(epochs: int, lease_seconds: float = 60.0, **options: str) -> Victim:
        server.grant(WORKER)
        recipe = tiny_recipe(tmp_path, tiny_model)
        recipe["train"]["epochs"] = epochs
        runtime = Runtime(
            store=s3.url,
            storage_options=options,
            cache=tmp_path / "cache",
            save_seconds=0.5,
            lease_seconds=lease_seconds,
        )
        keys = {"AWS_ACCESS_KEY_ID": WORKER[0], "AWS_SECRET_ACCESS_KEY": WORKER[1]}
        return Victim(raised, recipe, runtime, {**s3.environment, **keys})

    return make


@pytest.mark.failure(
    what="the bucket's server is killed while a run trains, and comes back",
    outcome="the run goes on and ends *Completed*",
)
def test_the_store_is_killed_and_comes_back(make_victim: Callable[..., Victim], server: SeaweedFS) -> None:
    victim = make_victim(epochs=12)
    run = victim.send()
    victim.trains(run)
    server.kill()
    server.start()
    ended = victim.raised.ended(run)
    assert ended.state and ended.state.is_completed(), ended.state
    victim.left_nothing()
    assert victim.trained()["resumed_at_step"] == 0


@pytest.mark.failure(
    what="the bucket's server is killed while a run trains, and stays away",
    outcome="*Suspended* once the lease's life is over (15 s in the test, otherwise 60), naming the outage, with its "
    "state saved; when the server is back the next run trains on from there",
)
def test_the_store_stays_away(make_victim: Callable[..., Victim], server: SeaweedFS, record_property: Record) -> None:
    victim = make_victim(epochs=40, lease_seconds=15.0)
    run = victim.send()
    victim.trains(run)
    server.kill()
    marked(victim, run, record_property, "the lease on this stage was lost")
    server.start()
    victim.left_nothing()
    assert victim.goes_on()["resumed_at_step"] > 0


@pytest.mark.failure(
    what="the bucket's key is revoked while a run trains",
    outcome="*Suspended* once the lease's life is over (15 s in the test, otherwise 60), naming the refusal, with its "
    "state saved; with a key that holds the next run trains on from there",
)
def test_the_key_is_revoked(make_victim: Callable[..., Victim], server: SeaweedFS, record_property: Record) -> None:
    victim = make_victim(epochs=40, lease_seconds=15.0)
    run = victim.send()
    victim.trains(run)
    server.revoke(WORKER)
    marked(victim, run, record_property, "refused these credentials")
    server.grant(WORKER)
    victim.left_nothing()
    assert victim.goes_on()["resumed_at_step"] > 0


def marked(victim: Victim, run: Any, record: Record, words: str) -> None:
    """The run ends in time as suspended, saying why, and its processes are gone."""
    since = time.monotonic()
    ended = victim.raised.ended(run)
    took = time.monotonic() - since
    record("marked_after", round(took, 1))
    assert ended.state and ended.state.name == "Suspended" and words in str(ended.state.message), ended.state
    assert took <= 120
    eventually(victim.processes, lambda found: not found)
