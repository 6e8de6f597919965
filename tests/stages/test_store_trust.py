"""What was hashed when it was committed is not hashed again for its first reader, unless it may have changed since."""

from collections.abc import Callable
from pathlib import Path

import pytest

import stages.identity
import stages.store
from stages import views
from stages.errors import UserError
from stages.identity import Action, Tree, tree_of
from stages.objects import blob_path
from stages.store import BadBlob, Store

FILES = {"shards/0.arrow": b"\x00\x01" * 500, "plan.json": b"{}"}

MakeFolder = Callable[[dict[str, bytes]], Path]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that views hash from here on."""
    found: list[Path] = []

    def told(path: Path) -> str:
        found.append(path)
        return real(path)

    real = views.sha256_file
    monkeypatch.setattr(views, "sha256_file", told)
    return found


def stored(store: Store, tree: Tree, path: str) -> Path:
    (sha256,) = (file.sha256 for file in tree.files if file.path == path)
    return Path(store.url) / blob_path(sha256)


def test_the_first_view_of_what_was_committed_hashes_nothing(
    store: Store, make_folder: MakeFolder, make_action: Callable[..., Action], hashed: list[Path]
) -> None:
    artifact = store.commit(make_action(), make_folder(FILES), {}, {})
    view = store.view(artifact.tree)
    assert {file.path: (view / file.path).read_bytes() for file in artifact.tree.files} == FILES
    assert hashed == []


def test_what_changed_after_its_commit_is_seen(
    store: Store, make_folder: MakeFolder, make_action: Callable[..., Action], hashed: list[Path]
) -> None:
    artifact = store.commit(make_action(), make_folder(FILES), {}, {})
    rewritten(stored(store, artifact.tree, "plan.json"), b"[]")
    with pytest.raises(BadBlob):
        store.view(artifact.tree)
    assert len(hashed) == 1


def test_what_changed_during_its_commit_is_seen(
    store: Store, make_folder: MakeFolder, make_action: Callable[..., Action], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(FILES)

    def hashed_then_changed(folder: Path) -> Tree:
        found = tree_of(folder)
        rewritten(folder / "plan.json", b"[]")
        return found

    monkeypatch.setattr(stages.store, "tree_of", hashed_then_changed)
    artifact = store.commit(make_action(), folder, {}, {})
    with pytest.raises(BadBlob):
        store.view(artifact.tree)


def test_what_grows_while_it_is_hashed_is_refused(
    store: Store, make_folder: MakeFolder, make_action: Callable[..., Action], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed_then_grown(path: Path) -> str:
        found = real(path)
        with path.open("ab") as file:
            file.write(b" ")
        return found

    real = stages.identity.sha256_file
    monkeypatch.setattr(stages.identity, "sha256_file", hashed_then_grown)
    with pytest.raises(UserError, match="changed while it was being stored"):
        store.commit(make_action(), make_folder(FILES), {}, {})


def rewritten(path: Path, data: bytes) -> None:
    """Write other bytes of the same size, until the file's time tells."""
    path.chmod(0o644)
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns <= before:
        path.write_bytes(data)
