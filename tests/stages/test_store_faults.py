"""A bad network between regrow and its bucket: everything arrives whole or is tried again, nothing is done twice."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from stages.checkpoints import fetch_checkpoint, latest_checkpoint, save_checkpoint
from stages.errors import UserError
from stages.gc import verify
from stages.identity import Action, tree_of
from stages.lease import lease
from stages.store import Store, open_store
from tests.stages.faulty_proxy import Fault, FaultyProxy, faulty_proxy

ACTION = Action("pack", {"pack": 1}, {"seed": 0}, {})


@pytest.fixture(
    params=["s3", pytest.param("google", marks=pytest.mark.full), pytest.param("azure", marks=pytest.mark.full)]
)
def bucket(request: pytest.FixtureRequest) -> Any:
    """One of each service's."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def proxy(bucket: Any) -> Iterator[FaultyProxy]:
    parts = urlsplit(bucket.endpoint)
    with faulty_proxy(f"{parts.scheme}://{parts.netloc}") as proxy:
        yield proxy


def through(proxy: FaultyProxy, bucket: Any, cache: Path, reached: bool = False) -> Store:
    options = bucket.through(proxy.endpoint) if hasattr(bucket, "through") else {"endpoint_url": proxy.endpoint}
    return open_store(bucket.url, cache, options, reached=reached)


def folder(path: Path, seed: int = 0, files: int = 6) -> Path:
    chance = random.Random(seed)
    path.mkdir(parents=True)
    for n in range(files):
        (path / f"{n}.bin").write_bytes(chance.randbytes(1000 + 200_000 * (n == 0)))
    return path


@pytest.mark.failure(
    what="the network to the bucket drops requests, loses or truncates answers, is late, answers 500",
    outcome="the store's work is repeated until it went through: artifacts, checkpoints, refs and leases arrive whole "
    "and once",
)
@pytest.mark.parametrize(
    "fault", ["drop", "lose", "truncate", *(pytest.param(name, marks=pytest.mark.full) for name in ("delay", "500"))]
)
def test_a_bad_network_costs_time_only(fault: Fault, proxy: FaultyProxy, bucket: Any, tmp_path: Path) -> None:
    store, direct = through(proxy, bucket, tmp_path / "cache"), open_store(bucket.url, tmp_path / "direct")
    proxy.faults = (fault,)
    wanted = tree_of(folder(tmp_path / "wanted")).digest
    artifact = store.commit(ACTION, folder(tmp_path / "output"), {}, {})
    assert artifact.digest == wanted
    assert tree_of(through(proxy, bucket, tmp_path / "other").view(artifact.tree)).digest == wanted
    save_checkpoint(store, ACTION.key, "one", 10, folder(tmp_path / "saved", 1, 2))
    found = latest_checkpoint(store, ACTION.key)
    assert found is not None and found.step == 10
    fetch_checkpoint(store, found, tmp_path / "restored")
    moved = [store.swap_ref("bot/production", None, {"n": 0})]
    for n in range(1, 5):
        ref = store.read_ref("bot/production")
        assert ref is not None
        moved.append(store.swap_ref("bot/production", ref.version, {"n": n}))
    assert moved == [True] * 5, "a swap whose answer was lost is recognised as one's own"
    with lease(store, "pack", ACTION.key, 60.0, "me") as held:
        assert not held.lost.is_set()
    proxy.faults = ()
    assert proxy.suffered[fault] > 3
    last = direct.read_ref("bot/production")
    assert last is not None and last.document == {"n": 4}
    assert verify(direct, deep=True).problems == []
    assert not list(direct.objects.list("quarantine/")), "what the network cut is not taken for a damaged store"


def test_a_store_is_opened_although_answers_are_cut(proxy: FaultyProxy, bucket: Any, tmp_path: Path) -> None:
    open_store(bucket.url, tmp_path / "direct").write_run("run", {})
    proxy.faults, proxy.share = ("truncate",), 0.15
    for n in range(8):
        assert through(proxy, bucket, tmp_path / str(n)).read_run("run") == {}
    assert proxy.suffered["truncate"] > 3


def test_a_store_that_was_reached_before_is_waited_for(proxy: FaultyProxy, bucket: Any, tmp_path: Path) -> None:
    open_store(bucket.url, tmp_path / "direct").write_run("run", {})
    proxy.faults, proxy.share = ("500",), 1.0
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(through, proxy, bucket, tmp_path / "reached", reached=True)
        with pytest.raises(UserError, match="cannot be reached"):
            through(proxy, bucket, tmp_path / "new")
        proxy.faults = ()
        assert waiting.result().read_run("run") == {}
