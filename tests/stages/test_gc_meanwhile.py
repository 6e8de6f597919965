"""gc and whoever commits at the same moment: whatever the order of their steps, nothing that lives is broken."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.gc import GRACE, collect
from stages.identity import Action
from stages.objects import Objects
from stages.production import Name, production, promote
from stages.store import STALE, Artifact, BadBlob, Store, open_store
from tests.stages.test_gc import MakeAction, MakeFolder, age, contents, elsewhere
from tests.stages.test_production import made


@dataclass(frozen=True)
class Interrupted:
    """Objects that let something else happen just before their n-th primitive."""

    objects: Objects
    left: list[int]
    happens: Callable[[], object]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.objects, name)
        if not callable(found) or name == "local":
            return found

        def step(*arguments: Any) -> Any:
            self.left[0] -= 1
            if self.left[0] == 0:
                self.happens()
            return found(*arguments)

        return step


def aged_store(folder: Path, make_folder: MakeFolder, make_action: MakeAction) -> tuple[Store, Action]:
    """A store with old artifacts that nobody names, of whose bytes some will be needed again."""
    store = open_store(str(folder / "store"), folder / "cache")
    store.commit(make_action(n=1), make_folder({"old": b"bytes that live twice", "other": b"o"}), {}, {})
    store.commit(make_action(n=2), make_folder({"old": b"bytes that live twice"}), {}, {})
    age(store, GRACE + STALE)
    return store, make_action(n=3)


FILES = {"again": b"bytes that live twice", "new": b"n"}


def test_gc_at_any_step_of_a_commit_breaks_nothing(
    tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    swept = step = 0
    left = [0]
    while left[0] <= 0:  # until the commit ended before the step came
        step, left = step + 1, [step + 1]
        store, action = aged_store(tmp_path / str(step), make_folder, make_action)

        def sweep(store: Store = store) -> None:
            nonlocal swept
            swept += collect(store, delete=True).freed["blobs"].count

        traced = replace(store, objects=Interrupted(store.objects, left, sweep))  # type: ignore[arg-type]
        artifact = traced.commit(action, make_folder(FILES), {}, {})
        assert store.find("pack", action.key) == artifact
        assert contents(elsewhere(store).view(artifact.tree)) == FILES, f"step {step}"
    assert step > 8 and swept >= step  # it was in the way, and it had something to sweep


def test_a_commit_at_any_step_of_gc_is_not_broken(
    tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    step, left = 0, [0]
    while left[0] <= 0:
        step, left = step + 1, [step + 1]
        store, action = aged_store(tmp_path / str(step), make_folder, make_action)

        def commit(store: Store = store, action: Action = action) -> None:
            store.commit(action, make_folder(FILES), {}, {})

        collect(replace(store, objects=Interrupted(store.objects, left, commit)), delete=True)  # type: ignore[arg-type]
        artifact = store.find("pack", action.key)
        if left[0] <= 0:
            assert artifact is not None
            assert contents(elsewhere(store).view(artifact.tree)) == FILES, f"step {step}"
    assert step > 15


def test_a_whole_made_at_any_step_of_gc_is_not_broken(
    tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    """Its parts are old and nobody names them: they may go before, but not once the whole stands."""
    step, left, stood = 0, [0], 0
    while left[0] <= 0:
        step, left = step + 1, [step + 1]
        store, action = aged_store(tmp_path / str(step), make_folder, make_action)
        part = store.find("pack", make_action(n=1).key)
        assert part is not None

        def commit(store: Store = store, action: Action = action, part: Artifact = part) -> None:
            with suppress(BadBlob):
                store.commit_whole(action, {"part": part}, {}, {})

        collect(replace(store, objects=Interrupted(store.objects, left, commit)), delete=True)  # type: ignore[arg-type]
        if whole := store.find("pack", action.key):
            stood += 1
            assert len(contents(elsewhere(store).view(whole.tree))) == 2, f"step {step}"
    assert stood > 5


def test_a_model_promoted_at_any_step_of_gc_is_whole_or_refused(tmp_path: Path) -> None:
    """gc read the names before; a model that waited for its promotion longer than the grace is nobody's by those."""
    step, left, promoted = 0, [0], 0
    while left[0] <= 0:
        step, left = step + 1, [step + 1]
        store = open_store(str(tmp_path / str(step)), tmp_path / "cache")
        weights, card = (made(store, "old", stage) for stage in ("merge", "publish"))
        age(store, GRACE + STALE)

        def by_person(store: Store = store, weights: Name = weights, card: Name = card) -> None:
            with suppress(UserError):
                promote(store, "bot", None, model=weights, card=card, run="r", compared=None, why="")

        collect(replace(store, objects=Interrupted(store.objects, left, by_person)), delete=True)  # type: ignore[arg-type]
        if found := production(store, "bot"):
            promoted += 1
            for stage, name in (("merge", found.now.model), ("publish", found.now.card)):
                kept = store.recall(stage, name["key"], name["digest"])
                assert kept and not store.missing(kept.tree), f"step {step}"
    assert 5 < promoted < step, "it was in time, and it was too late"


def test_a_blob_deleted_just_before_the_manifest_stands_is_written_again(
    store: Store, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    output, deleted = make_folder(FILES), []

    class Deleting:
        def __getattr__(self, name: str) -> Any:
            if name == "create" and not deleted:
                deleted.extend(entry.path for entry in store.objects.list("blobs/"))
                for path in deleted:
                    store.objects.delete(path)
            return getattr(store.objects, name)

    artifact = replace(store, objects=Deleting()).commit(make_action(), output, {}, {})  # type: ignore[arg-type]
    assert len(deleted) == 2
    assert contents(elsewhere(store).view(artifact.tree)) == FILES


def test_bytes_used_again_are_made_young(any_store: Store, make_folder: MakeFolder, make_action: MakeAction) -> None:
    part = any_store.commit(make_action(n=1), make_folder(FILES), {}, {})
    [old, *_] = any_store.objects.list("blobs/")
    assert any_store.objects.touch(old)
    now = any_store.objects.stat(old.path)
    assert now is not None and now.size == old.size and now.modified >= old.modified
    assert contents(elsewhere(any_store).view(part.tree)) == FILES
    any_store.objects.delete(old.path)
    assert not any_store.objects.touch(old) and any_store.objects.stat(old.path) is None
