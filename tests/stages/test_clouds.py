"""What is each cloud's own: credentials and rights told in one line, large files, servers that ignore conditions, and
sources. The contract that all stores keep is tested for them too (`any_url`)."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.gc import collect
from stages.objects import MayNotDelete, blob_path
from stages.objects.google_api import GoogleApi
from stages.store import open_store
from stages.transfers import watching
from tests.clouds import Azure, Google
from tests.stages.conftest import MakeAction, MakeFolder
from tests.stages.fetching import ROW, bring, home, names, pieces_of, shards

__all__ = ["home"]

SECRET = "YS1zZWNyZXQtdGhhdC1ub2JvZHktbWF5LXNlZQ=="
LARGE = {"gs": 40 * 2**20, "az": 72 * 2**20}
"""More than goes up in one request: Azure's client takes 64 MiB for one."""
CLOUDS = pytest.mark.parametrize("cloud", ["google", pytest.param("azure", marks=pytest.mark.full)], indirect=True)


@pytest.fixture
def cloud(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def refusal(url: str, cache: Path, **options: str) -> str:
    """The one line that opening a store fails with, which comes soon and holds no secret."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        open_store(url, cache, options)
    assert time.monotonic() - started < 15
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    return str(caught.value)


@CLOUDS
def test_a_large_file_goes_up_in_parts_and_is_told_up_to_the_last_byte(
    cloud: Any, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.transfers.LONG", 2**20)
    monkeypatch.setattr("stages.transfers.EVERY", 0.0)
    told: list[tuple[str, int, int]] = []
    large = LARGE[cloud.url[:2]]
    data = os.urandom(2**20) * (large >> 20)
    with watching(lambda *heard: told.append(heard)):
        made = open_store(cloud.url, tmp_path / "here").commit(make_action(), make_folder({"model": data}), {}, {})
        view = open_store(cloud.url, tmp_path / "there").view(made.tree)
    assert (view / "model").read_bytes() == data
    for what in ("uploaded", "downloaded"):
        heard = [done for which, done, total in told if which == what and total == large]
        assert heard[0] == 0 and heard[-1] == large and heard == sorted(heard) and len(heard) > 3


@CLOUDS
def test_no_bucket_no_server_and_options_that_make_no_sense(cloud: Any, tmp_path: Path) -> None:
    scheme = cloud.url.partition("://")[0]
    assert "there is no" in (told := refusal(f"{scheme}://no-such-place/store", tmp_path)) and cloud.endpoint in told
    told = refusal(cloud.url, tmp_path, **cloud.through("http://127.0.0.1:9"))
    assert "cannot be reached at http://127.0.0.1:9" in told
    assert "is not known; choose from" in refusal(cloud.url, tmp_path, endpoint="http://127.0.0.1:9")
    assert "credentials belong in the environment" in refusal(f"{scheme}://key:{SECRET}@bucket/store", tmp_path)


@pytest.mark.full
def test_azure_credentials_that_are_refused_or_missing(
    azure: Azure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = azure.connection.rpartition("AccountKey=")[0] + f"AccountKey={SECRET}"
    told = refusal(azure.url, tmp_path, connection_string=wrong)
    assert "refused these credentials" in told and "AZURE_STORAGE_ACCOUNT_KEY" in told
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"AccountKey={SECRET}")
    assert "no account and credentials were found" in refusal(azure.url, tmp_path)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    assert "AZURE_STORAGE_ACCOUNT_NAME" in refusal(azure.url, tmp_path)


@pytest.mark.full
def test_azure_signatures_with_less_than_all_rights(
    azure: Azure, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    worker = open_store(azure.url, tmp_path / "worker", azure.signed("rcwl"))
    made = worker.commit(make_action(), make_folder({"a": b"1"}), {}, {})
    again = worker.commit(make_action(), make_folder({"a": b"2"}), {}, {}, replace=True)
    assert worker.recall("pack", made.key, made.digest) is not None and again.digest != made.digest
    with pytest.raises(MayNotDelete, match="may not delete there"):
        collect(worker, delete=True, grace=-60)
    reader = open_store(azure.url, tmp_path / "reader", azure.signed("rl"))
    found = reader.find("pack", again.key)
    assert found is not None and (reader.view(found.tree) / "a").read_bytes() == b"2"
    with pytest.raises(UserError, match=r"may not write there .* a run needs the rights of a worker"):
        reader.write_run("run", {})


def test_google_rights_that_are_missing_are_told(google: Google, tmp_path: Path) -> None:
    store = open_store(google.url, tmp_path)
    try:
        google.server.forbidden |= {"storage.objects.create", "storage.objects.delete"}
        with pytest.raises(UserError, match=r"may not write there \(storage.objects.create\)"):
            store.write_run("run", {})
        with pytest.raises(MayNotDelete, match=r"may not delete there \(storage.objects.delete\)"):
            store.objects.delete("format.json")
        google.server.forbidden = {"storage.objects.delete"}
        store.write_run("run", {})
        with pytest.raises(UserError, match=r"may not write there \(storage.objects.delete\)"):
            store.write_run("run", {"again": True})  # to replace an object is to delete it
        google.server.forbidden = {"storage.objects.get"}
        assert "refused these credentials (403)" in refusal(google.url, tmp_path)
    finally:
        google.server.forbidden.clear()


def test_google_keeps_half_a_part_and_is_sent_the_rest(google: Google, tmp_path: Path) -> None:
    google.server.keeps = 10 * 2**20
    data = os.urandom(2**20) * 35
    (tmp_path / "model").write_bytes(data)
    try:
        moved: list[int] = []
        open_store(google.url, tmp_path).objects.upload(tmp_path / "model", "blobs/model", "", moved.append)
    finally:
        google.server.keeps = None
    assert google.server.buckets[google.bucket]["store/blobs/model"]["data"] == data
    assert sum(moved) == len(data) and max(moved) == 10 * 2**20


def test_google_refuses_bytes_that_are_not_what_was_sent(google: Google, tmp_path: Path) -> None:
    objects: Any = open_store(google.url, tmp_path).objects
    (tmp_path / "small").write_bytes(b"small")

    class Garbling(GoogleApi):
        """A connection on which a byte changes."""

        def ask(self, method: str, url: str, query: Any = None, data: Any = None, headers: Any = None) -> Any:
            return super().ask(method, url, query, data.replace(b"small", b"smalL"), headers)

    garbling = replace(objects, api=Garbling(objects.api.fs, objects.api.place, objects.api.patience))
    with pytest.raises(UserError, match="MD5"):
        garbling.upload(tmp_path / "small", blob_path("0" * 64), "0" * 64)
    assert objects.stat(blob_path("0" * 64)) is None


@CLOUDS
def test_listings_of_many_pages_are_whole_and_touching_makes_young(cloud: Any, tmp_path: Path) -> None:
    objects = open_store(cloud.url, tmp_path).objects
    names = [f"refs/many/{n}.json" for n in range(250)]
    for name in names:
        objects.put(name, b"{}")
    entries = {entry.path: entry for entry in objects.list("refs/")}
    assert sorted(entries) == sorted(names)
    old = entries[names[0]]
    time.sleep(1.1)  # Azure tells times in whole seconds
    assert objects.touch(old)
    now = objects.stat(old.path)
    assert now is not None and now.modified > old.modified and objects.read(old.path).data == b"{}"  # type: ignore[union-attr]
    assert not objects.delete(old.path, before=now.modified)
    assert objects.delete(old.path) and not objects.delete(old.path) and not objects.touch(old)


def test_a_server_that_ignores_conditions_is_refused(google_emulator: str, tmp_path: Path) -> None:
    told = refusal(f"gs://{google_emulator}/store", tmp_path)
    assert "ignores conditional writes" in told


def test_sources_come_from_google(google_emulator: str, home: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("gs", endpoint_url=os.environ["STORAGE_EMULATOR_HOST"], skip_instance_cache=True)
    _sources(fs, "gs", google_emulator, home)


@pytest.mark.full
def test_sources_come_from_azure(azure: Azure, home: Path) -> None:
    import adlfs

    fs = adlfs.AzureBlobFileSystem(skip_instance_cache=True)
    _sources(fs, "az", azure.container, home)


def _sources(fs: Any, scheme: str, bucket: str, home: Path) -> None:
    for name in ("a", "b"):
        fs.pipe_file(f"{bucket}/data/{name}.jsonl", ROW * 2 if name == "a" else ROW)
    for location in (f"{scheme}://{bucket}/data/*.jsonl", f"{scheme}://{bucket}/data"):
        found = shards({"files": location})
        assert names(found) == ["a.jsonl", "b.jsonl"]
    assert pieces_of(bring(found[0], home / "out")) == [(1, ROW * 2)]
    fs.pipe_file(f"{bucket}/data/b.jsonl", ROW.replace(b"hi", b"ho"))
    changed = shards({"files": f"{scheme}://{bucket}/data"})
    assert changed[0].config == found[0].config and changed[1].config != found[1].config
    with pytest.raises(UserError, match=r"b\.jsonl changed while the run was going on"):
        bring(found[1], home / "b")
