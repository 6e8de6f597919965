"""Checkpoints in the store: complete or invisible, the highest step of any attempt, verified when fetched."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.checkpoints import KEPT, drop_checkpoints, fetch_checkpoint, latest_checkpoint, save_checkpoint
from stages.errors import UserError
from stages.mirror import Mirror
from stages.store import BadBlob, Store

KEY = "0" * 64
MakeFolder = Callable[[dict[str, bytes]], Path]


def step_files(step: int) -> dict[str, bytes]:
    return {"adapter/weights": b"w%d" % step, "optimizer": b"o%d" % step, "rng/0": b""}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def paths(store: Store) -> list[str]:
    return sorted(entry.path for entry in store.objects.list(f"checkpoints/{KEY}/"))


def test_the_highest_step_of_any_attempt_comes_back(any_store: Store, make_folder: MakeFolder, tmp_path: Path) -> None:
    assert latest_checkpoint(any_store, KEY) is None
    save_checkpoint(any_store, KEY, "first", 100, make_folder(step_files(100)))
    save_checkpoint(any_store, KEY, "second", 90, make_folder(step_files(90)))
    found = latest_checkpoint(any_store, KEY)
    assert found is not None and (found.step, found.attempt) == (100, "first")
    fetch_checkpoint(any_store, found, tmp_path / "work" / "checkpoints" / "100")
    assert contents(tmp_path / "work" / "checkpoints" / "100") == step_files(100)
    assert [p.name for p in (tmp_path / "work" / "checkpoints").iterdir()] == ["100"]
    assert latest_checkpoint(any_store, "1" * 64) is None


def test_steps_are_numbers_and_old_ones_go(any_store: Store, make_folder: MakeFolder) -> None:
    for step in (9, 10, 100, 1000):
        save_checkpoint(any_store, KEY, "only", step, make_folder(step_files(step)))
        found = latest_checkpoint(any_store, KEY)
        assert found is not None and found.step == step
    assert len({path.split("/")[3] for path in paths(any_store)}) == KEPT


def test_what_is_torn_is_passed_over(any_store: Store, make_folder: MakeFolder) -> None:
    save_checkpoint(any_store, KEY, "one", 10, make_folder(step_files(10)))
    torn = save_checkpoint(any_store, KEY, "two", 20, make_folder(step_files(20)))
    any_store.objects.delete(f"{torn.path}/files/optimizer")
    found = latest_checkpoint(any_store, KEY)
    assert found is not None and found.step == 10
    save_checkpoint(any_store, KEY, "three", 30, make_folder(step_files(30)))
    third = latest_checkpoint(any_store, KEY)
    assert third is not None and third.step == 30
    any_store.objects.delete(f"{third.path}/complete.json")
    found = latest_checkpoint(any_store, KEY)
    assert found is not None and found.step == 10


def test_a_damaged_checkpoint_is_retired_when_it_is_fetched(
    any_store: Store, make_folder: MakeFolder, tmp_path: Path
) -> None:
    save_checkpoint(any_store, KEY, "one", 10, make_folder(step_files(10)))
    bad = save_checkpoint(any_store, KEY, "one", 20, make_folder(step_files(20)))
    any_store.objects.put(f"{bad.path}/files/optimizer", b"oXX")
    assert latest_checkpoint(any_store, KEY) == bad  # sizes agree
    with pytest.raises(BadBlob, match="optimizer of step 20"):
        fetch_checkpoint(any_store, bad, tmp_path / "restored")
    assert not list(tmp_path.glob("*restored*"))
    good = latest_checkpoint(any_store, KEY)
    assert good is not None and good.step == 10
    fetch_checkpoint(any_store, good, tmp_path / "restored")
    assert contents(tmp_path / "restored") == step_files(10)


def test_an_attempt_cannot_save_a_step_twice(any_store: Store, make_folder: MakeFolder) -> None:
    save_checkpoint(any_store, KEY, "one", 10, make_folder(step_files(10)))
    with pytest.raises(UserError, match="already saved"):
        save_checkpoint(any_store, KEY, "one", 10, make_folder(step_files(11)))


@pytest.mark.parametrize("torn", [True, False])
def test_a_checkpoint_of_this_machine_that_is_damaged_is_fetched_anew(
    any_store: Store, make_folder: MakeFolder, tmp_path: Path, torn: bool
) -> None:
    local = tmp_path / "work" / "checkpoints" / "10"
    save_checkpoint(any_store, KEY, "one", 10, make_folder(step_files(10)))
    shutil.copytree(make_folder(step_files(10)), local)
    before = local.stat().st_ino
    if torn:
        next(path for path in local.rglob("*") if path.is_file()).unlink()
    Mirror(any_store, KEY, tmp_path / "work", print).restore()
    assert contents(local) == step_files(10)
    assert (local.stat().st_ino == before) is not torn


@pytest.mark.parametrize("local", [5, 20])
def test_what_broke_off_on_its_way_is_not_left_behind(
    any_store: Store, make_folder: MakeFolder, tmp_path: Path, local: int
) -> None:
    save_checkpoint(any_store, KEY, "one", 10, make_folder(step_files(10)))
    for name in (f"{local}", ".fetching-9-one", ".fetching-15-two"):
        (tmp_path / "work" / "checkpoints" / name).mkdir(parents=True)
    Mirror(any_store, KEY, tmp_path / "work", print).restore()
    left = {path.name for path in (tmp_path / "work" / "checkpoints").iterdir()}
    assert left == ({"5", "10"} if local == 5 else {"20"})


def test_dropping_leaves_nothing_of_this_key(any_store: Store, make_folder: MakeFolder) -> None:
    for attempt, step in (("one", 10), ("two", 10), ("two", 20)):
        save_checkpoint(any_store, KEY, attempt, step, make_folder(step_files(step)))
    other = save_checkpoint(any_store, "1" * 64, "one", 10, make_folder(step_files(10)))
    drop_checkpoints(any_store, KEY)
    assert paths(any_store) == []
    assert latest_checkpoint(any_store, "1" * 64) == other
