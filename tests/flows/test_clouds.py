"""Whole runs whose store lies in Azure (Azurite) or behind Google's API (a server of the tests), and models that go
from one cloud to another."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flows.promotion import promote
from flows.settle import settle
from stages.deliver import delivered, delivery
from stages.gc import verify
from stages.runtime import Runtime
from stages.store import open_store
from tests.clouds import Google, azure, azure_server, google, google_api
from tests.conftest import S3
from tests.flows.conftest import Tiny
from tests.flows.rehearsal import Rehearsal

__all__ = ["azure", "azure_server", "google", "google_api"]

STAGES = {"fetch", "convert", "tokenize", "pack", "train", "merge", "evaluate", "publish"}


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cloud", ["azure", "google"])
def test_a_run_makes_all_and_the_next_one_finds_it(
    cloud: str, request: pytest.FixtureRequest, make_tiny: Callable[[], Tiny], tmp_path: Path
) -> None:
    url = request.getfixturevalue(cloud).url
    tiny = replace(make_tiny(), runtime=Runtime(store=url, cache=tmp_path / "cache", device="cpu"))
    tiny.run()
    store = open_store(url, tmp_path / "elsewhere")
    made: dict[tuple[str, str], Any] = {(stage, key): entry.modified for stage, key, entry in store.manifests()}
    assert {stage for stage, _ in made} >= STAGES
    tiny.run()
    assert {(stage, key): entry.modified for stage, key, entry in store.manifests()} == made
    assert verify(store, deep=True).problems == []
    assert not list(store.objects.list("quarantine/"))


def test_a_destination_on_another_service_gets_none_of_the_stores_options(
    google: Google, s3: S3, tmp_path: Path
) -> None:
    rehearsal, to = Rehearsal(tmp_path, google.url), f"s3://{s3.bucket}/models"
    for right, approval in ((10, False), (20, True)):
        run = rehearsal.make(rehearsal.start(right, to=to, approval=approval))
        run.runtime = run.runtime.model_copy(update={"storage_options": {"endpoint_url": google.endpoint}})
        run.record("finished", asdict(outcome := settle(run)))
        assert outcome.arrived != approval
    assert promote(rehearsal.store, run.runtime, "bot", run.id).what == "promoted"
    assert delivered(to, delivery(run.artifacts["merge"].tree, run.artifacts["publish"].tree))


def test_options_of_the_store_are_for_its_service_or_for_any_where_it_is_a_folder() -> None:
    options = {"anon": "true"}
    for store, place, meant in (
        ("az://box/store", "az://other/models", True),
        ("az://box/store", "s3://bucket/models", False),
        ("s3://bucket/store", "gs://bucket/models", False),
        ("s3", "s3://bucket/models", True),
        ("/srv/store", "az://box/models", True),
    ):
        assert Runtime(store=store, storage_options=options).options_for(place) == (options if meant else {})
