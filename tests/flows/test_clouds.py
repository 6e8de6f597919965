"""Whole runs whose store lies in Azure (Azurite) or behind Google's API (a server of the tests)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.gc import verify
from stages.runtime import Runtime
from stages.store import open_store
from tests.clouds import azure, azure_server, google, google_api
from tests.flows.conftest import Tiny

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
