"""Stores to test against: a folder, this process's memory, and buckets: of a real S3 server, of Azure's emulator, of a
server that obeys Google's conditions; and a user without root's rights."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import pytest

from stages.identity import Action, Json
from stages.store import Store, open_store
from tests.clouds import azure, azure_server, google, google_api, google_emulator

__all__ = ["azure", "azure_server", "google", "google_api", "google_emulator"]

MakeFolder = Callable[[Mapping[str, bytes]], Path]
MakeAction = Callable[..., Action]


BUCKETS = ("s3", "azure", "google")
"""Fixtures whose `url` is a fresh store's."""


@pytest.fixture
def somebody(tmp_path: Path) -> Iterator[None]:
    """Act as a user without root's rights."""
    if os.geteuid() != 0:
        yield
        return
    for folder in [tmp_path, *tmp_path.parents]:  # pytest keeps its folders to the user who runs it
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(params=["folder", "memory", "s3", "google", pytest.param("azure", marks=pytest.mark.full)])
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store's URL, of every kind."""
    if request.param in BUCKETS:
        return str(request.getfixturevalue(request.param).url)
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid4().hex}"


@pytest.fixture
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store's URL that other processes can open too, of the kind the test is parametrized with."""
    return str(request.getfixturevalue(request.param).url) if request.param in BUCKETS else str(tmp_path / "store")


@pytest.fixture
def any_store(any_url: str, tmp_path: Path) -> Store:
    return open_store(any_url, tmp_path / "cache")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in a folder."""
    return open_store(str(tmp_path / "store"), tmp_path / "cache")


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes files into a new folder, the way a stage's output lies there."""

    def make(files: Mapping[str, bytes]) -> Path:
        folder = tmp_path / "outputs" / uuid4().hex
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return make


@pytest.fixture
def make_action() -> MakeAction:
    """Actions that differ in what is given."""

    def make(stage: str = "pack", **config: Json) -> Action:
        return Action(stage, {stage: 1}, config, {"tokens": "0" * 64})

    return make
