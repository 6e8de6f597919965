"""Runs on the workers of `regrow up` over a bucket that fails while they train: its server, its keys, its network."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from stages.runtime import Runtime
from tests.conftest import S3, SeaweedFS
from tests.flows.conftest import tiny_recipe
from tests.flows.raised import Raised, eventually
from tests.flows.victim import Victim
from tests.stages.faulty_proxy import Fault, faulty_proxy

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


@pytest.mark.failure(
    what="for a whole run the network drops one in ten requests to the bucket, loses or truncates the answer, is late, "
    "or answers 500",
    outcome="the run ends *Completed*, and has made what it makes over a good network",
)
def test_the_network_is_bad(make_victim: Callable[..., Victim], server: SeaweedFS, tmp_path: Path) -> None:
    with faulty_proxy(server.endpoint) as proxy:
        victim = make_victim(epochs=2, endpoint_url=proxy.endpoint)
        proxy.faults, proxy.share = get_args(Fault), 0.1
        ended = victim.raised.ended(victim.send("+publish"))
        proxy.faults = ()
    assert ended.state and ended.state.is_completed(), ended.state
    assert set(proxy.suffered) == set(get_args(Fault)), proxy.suffered
    victim.left_nothing()
    for folder in ("quarantine/", "superseded/"):
        assert not list(victim.store.objects.list(folder)), folder
    calm = replace(victim, runtime=Runtime(store=str(tmp_path / "calm"), cache=tmp_path / "calm-cache"))
    ended = calm.raised.ended(calm.send("+publish"))
    assert ended.state and ended.state.is_completed(), ended.state
    assert made(victim) == made(calm)


def made(victim: Victim) -> dict[tuple[str, str, str], str]:
    """The digest of each file of each artifact, but for the one that names the run."""
    found = [victim.store.find(stage, key) for stage, key, _ in victim.store.manifests()]
    files = [(artifact, file) for artifact in found if artifact for file in artifact.tree.files]
    return {(a.stage, a.key, f.path): f.sha256 for a, f in files if f.path != "lineage.json"}


def marked(victim: Victim, run: Any, record: Record, words: str) -> None:
    """The run ends in time as suspended, saying why, and its processes are gone."""
    since = time.monotonic()
    ended = victim.raised.ended(run)
    took = time.monotonic() - since
    record("marked_after", round(took, 1))
    assert ended.state and ended.state.name == "Suspended" and words in str(ended.state.message), ended.state
    assert took <= 120
    eventually(victim.processes, lambda found: not found)
