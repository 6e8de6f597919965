"""What a store can be used for with less than all rights: read-only, and by a worker that may not delete."""

import contextlib
from pathlib import Path

import pytest

from stages.checkpoints import drop_checkpoints, latest_checkpoint, save_checkpoint
from stages.errors import UserError
from stages.gc import collect
from stages.lease import lease
from stages.objects import MayNotDelete
from stages.store import Store, open_store
from tests.conftest import READER, S3, WORKER
from tests.stages.conftest import MakeAction, MakeFolder

FILES = {"weights/model": b"w" * 1000, "train.json": b"{}"}


@pytest.fixture
def filled(any_url: str, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction) -> Store:
    store = open_store(any_url, tmp_path / "cache")
    artifact = store.commit(make_action(), make_folder(FILES), {}, {})
    store.swap_ref("bot/production", None, {"key": artifact.key})
    return store


def test_a_store_that_is_only_read_gives_all_and_takes_nothing(
    filled: Store, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    before = {(e.path, e.modified) for e in filled.objects.list("")}
    store = open_store(filled.url, tmp_path / "other cache", read_only=True)
    found = store.find("pack", make_action().key)
    assert found is not None and store.missing(found.tree) == []
    view = store.view(found.tree)
    assert {p.relative_to(view).as_posix(): p.read_bytes() for p in view.rglob("*") if p.is_file()} == FILES
    ref = store.read_ref("bot/production")
    assert ref is not None and collect(store).deleted is False
    writes = (
        lambda: store.commit(make_action(n=2), make_folder({"a": b"new"}), {}, {}),
        lambda: store.write_run("run", {}),
        lambda: store.swap_ref("bot/production", ref.version, {}),
        lambda: store.swap_ref("other/production", None, {}),
        lambda: collect(store, delete=True, grace=-60),
        lambda: contextlib.ExitStack().enter_context(lease(store, "pack", "0" * 64, 60, "me")),
    )
    for write in writes:
        with pytest.raises(UserError, match=r"is used read-only \(REGROW_READ_ONLY\), which rules out"):
            write()
    assert {(e.path, e.modified) for e in filled.objects.list("")} == before


def test_a_store_that_is_not_there_is_not_founded_to_be_read(any_url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no store here, and read-only none is founded"):
        open_store(any_url, tmp_path / "cache", read_only=True)
    assert not (tmp_path / "store").exists()


def keys(pair: tuple[str, str]) -> dict[str, str]:
    return {"key": pair[0], "secret": pair[1]}


def test_a_key_that_may_only_read_reads_and_is_told_in_one_line_when_it_would_write(
    s3: S3, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    theirs = open_store(s3.url, tmp_path / "cache")
    theirs.commit(make_action(), make_folder(FILES), {}, {})
    store = open_store(s3.url, tmp_path / "other cache", keys(READER))
    found = store.find("pack", make_action().key)
    assert found is not None and store.view(found.tree).is_dir()
    with pytest.raises(UserError) as told:
        store.commit(make_action(n=2), make_folder({"a": b"new"}), {}, {})
    assert "these credentials may not write there (PutObject)" in str(told.value) and "\n" not in str(told.value)
    assert "REGROW_READ_ONLY=1" in str(told.value)


def test_a_key_that_may_not_delete_does_all_that_a_worker_does(
    s3: S3, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    s3.forbid_deleting()
    store = open_store(s3.url, tmp_path / "cache", keys(WORKER))
    with pytest.raises(MayNotDelete, match=r"may not delete there \(DeleteObject\).*operator"):
        store.objects.delete("format.json")
    for _ in range(2):  # a second one takes the released lease over
        with lease(store, "pack", make_action().key, 60, "worker"):
            pass
    for step in (1, 2, 3, 4):
        save_checkpoint(store, make_action().key, "now", step, make_folder({"state": bytes([step])}))
    newest = latest_checkpoint(store, make_action().key)
    assert newest is not None and newest.step == 4
    made = store.commit(make_action(), make_folder(FILES), {}, {})
    drop_checkpoints(store, make_action().key)
    again = store.commit(make_action(), make_folder({"a": b"forced"}), {}, {}, replace=True)
    assert store.recall("pack", made.key, made.digest) is not None and again.digest != made.digest
    another, before = open_store(s3.url, tmp_path / "cache", keys(WORKER)), list(store.objects.list(""))
    another.commit(make_action(n=2), make_folder({"b": b"more"}), {}, {})
    more = sorted(e.path.partition("/")[0] for e in store.objects.list("") if e.path not in {e.path for e in before})
    assert more == ["actions", "blobs"], "what is left besides would become more with every run"
    with pytest.raises(MayNotDelete):
        collect(store, delete=True, grace=-60)
