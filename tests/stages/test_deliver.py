"""Delivering: whole or not at all, nobody's files lost, the store safe from edits, buckets and the Hub alike."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from stages.deliver import deliver, delivered, delivery, refuse_taken
from stages.deliver.folder import sweep
from stages.deliver.hub import deliver_to_hub
from stages.deliver.index import INDEX, index_document
from stages.errors import UserError
from stages.identity import Action, Tree, tree_of
from stages.store import Store, open_store

MODEL = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "tokenizer/vocab.txt": b"a\nb\n"}
NEWER = {"config.json": b"{ }", "model-00001.safetensors": b"more weights" * 1000}


def stored(store: Store, folder: Path, files: Mapping[str, bytes]) -> Tree:
    """Files committed to a store, as their tree."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return store.commit(Action("merge", {"merge": 1}, {"n": uuid4().hex}, {}), folder, {}, {}).tree


@pytest.fixture
def tree(store: Store, tmp_path: Path) -> Tree:
    return stored(store, tmp_path / "made", MODEL)


@pytest.fixture
def newer(store: Store, tmp_path: Path) -> Tree:
    return stored(store, tmp_path / "newer", NEWER)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != INDEX]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}")]


# ---- a folder ---------------------------------------------------------------------------------------------------


def test_a_delivery_is_whole_and_known_to_be_there(store: Store, tree: Tree, tmp_path: Path) -> None:
    to = tmp_path / "out" / "mine"
    assert not delivered(str(to), tree)
    deliver(str(to), tree, store, "bot")
    assert contents(to) == MODEL
    assert delivered(str(to), tree)
    assert hidden(to) == []


def test_delivering_again_touches_nothing(store: Store, tree: Tree, tmp_path: Path) -> None:
    to = tmp_path / "mine"
    deliver(str(to), tree, store, "bot")
    before = to.stat().st_ino
    deliver(str(to), tree, store, "bot")
    assert to.stat().st_ino == before


def test_a_new_version_replaces_the_old_one_wholly(store: Store, tree: Tree, newer: Tree, tmp_path: Path) -> None:
    to = tmp_path / "mine"
    deliver(str(to), tree, store, "bot")
    deliver(str(to), newer, store, "bot")
    assert contents(to) == NEWER
    assert delivered(str(to), newer) and not delivered(str(to), tree)
    assert hidden(to) == []


def test_editing_a_delivered_file_leaves_the_store_as_it_was(store: Store, tree: Tree, tmp_path: Path) -> None:
    to = tmp_path / "mine"
    deliver(str(to), tree, store, "bot")
    (to / "model.safetensors").write_bytes(b"edited")
    assert tree_of(store.view(tree)) == tree
    assert not delivered(str(to), tree)


@pytest.mark.parametrize("kind", ["foreign", "added", "edited", "file", "link", "broken index"])
def test_what_regrow_did_not_write_is_never_replaced(
    kind: str, store: Store, tree: Tree, newer: Tree, tmp_path: Path
) -> None:
    to = tmp_path / "mine"
    if kind == "file":
        to.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        to.symlink_to(tmp_path / "elsewhere")
    elif kind == "foreign":
        to.mkdir()
        (to / "thesis.txt").write_text("mine")
    else:
        deliver(str(to), tree, store, "bot")
        name = {"added": "notes.txt", "edited": "config.json", "broken index": INDEX}[kind]
        (to / name).write_text("mine")
    named = {"foreign": "thesis.txt", "added": "notes.txt", "edited": "config.json", "broken index": INDEX}.get(
        kind, "mine"
    )
    before = contents(to)
    with pytest.raises(UserError, match=named):
        deliver(str(to), newer, store, "bot")
    assert contents(to) == before


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="it is a mount point on Linux")
def test_a_mount_point_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(UserError, match=r"/proc is a mount point.*name a folder inside it"):
        refuse_taken("/proc", "bot")


def test_an_empty_folder_is_taken(store: Store, tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    deliver(str(tmp_path / "mine"), tree, store, "bot")
    assert contents(tmp_path / "mine") == MODEL


def test_a_place_that_cannot_be_written_is_named(store: Store, tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"publish\.to: .*file/mine"):
        deliver(str(tmp_path / "file" / "mine"), tree, store, "bot")


KILLED = """
import os, signal, sys
from pathlib import Path
from stages.deliver import folder
from stages.identity import tree_of
left = int(sys.argv[1])
def sync(path, sync=folder._sync):
    global left
    sync(path)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
folder._sync = sync
view = Path(sys.argv[2])
folder.deliver_to_folder(Path(sys.argv[3]), tree_of(view), view, "bot")
"""


def killed(after: int, view: Path, to: Path) -> bool:
    """Deliver in a process that dies at its n-th write; whether it died."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(after), str(view), str(to)], capture_output=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_at_any_moment_there_is_the_old_version_or_the_new_one(
    earlier: bool, store: Store, tree: Tree, newer: Tree, tmp_path: Path
) -> None:
    seen = set()
    for after in range(1, 20):
        to = tmp_path / f"out-{after}" / "mine"
        if earlier:
            deliver(str(to), tree, store, "bot")
        died = killed(after, store.view(newer), to)
        if to.exists():
            whole = contents(to)
            assert whole in ((MODEL, NEWER) if earlier else (NEWER,))
            seen.add("new" if whole == NEWER else "old")
        else:
            assert not earlier
            seen.add("nothing")
        deliver(str(to), newer, store, "bot")
        assert contents(to) == NEWER
        assert hidden(to) == []
        if not died:
            break
    else:
        pytest.fail("it was killed each time: the delivery has more writes than expected")
    assert seen == {"old" if earlier else "nothing", "new"}


def test_readers_never_find_the_folder_missing(store: Store, tree: Tree, newer: Tree, tmp_path: Path) -> None:
    to = tmp_path / "mine"
    deliver(str(to), tree, store, "bot")
    stop, found = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                found.append(json.loads((to / INDEX).read_text())["digest"])
            except OSError as error:
                found.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for version in [newer, tree] * 30:
        deliver(str(to), version, store, "bot")
    stop.set()
    reader.join()
    assert set(found) <= {tree.digest, newer.digest} and found


class LostAfter:
    """A lease that is lost after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __call__(self) -> None:
        self.looks -= 1
        if self.looks < 0:
            raise UserError("lost")


def test_a_delivery_that_lost_its_turn_leaves_the_folder_as_it_is(
    store: Store, tree: Tree, newer: Tree, tmp_path: Path
) -> None:
    to = tmp_path / "mine"
    deliver(str(to), tree, store, "bot")
    with pytest.raises(UserError, match="lost"):
        deliver(str(to), newer, store, "bot", go_on=LostAfter(0))
    assert contents(to) == MODEL and hidden(to) == []


def test_a_delivery_in_progress_is_not_swept_and_locks_a_file(store: Store, tree: Tree, tmp_path: Path) -> None:
    """NFS locks no folder."""
    to = tmp_path / "mine"
    held: list[Path] = []

    def look() -> None:
        sweep(to)
        held.extend(path for path in tmp_path.glob(".mine.*") if path.is_file())

    deliver(str(to), tree, store, "bot", go_on=look)
    assert contents(to) == MODEL and hidden(to) == []
    assert len(held) == 1 and str(held[0]).endswith(".lock")


# ---- a bucket, and fsspec's other file systems --------------------------------------------------------------------


@pytest.fixture(
    params=[
        *("s3, the store too", "s3, the store a folder", "memory", "google"),
        pytest.param("azure", marks=pytest.mark.full),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Store, Any]]:
    """(destination, store, file system)"""
    import fsspec

    if request.param == "memory":
        name = uuid4().hex
        fs = fsspec.filesystem("memory")
        yield f"memory://{name}/mine", open_store(str(tmp_path / "store"), tmp_path / "cache"), fs
        fs.rm(f"/{name}", recursive=True)
        return
    if request.param in ("azure", "google"):
        found = request.getfixturevalue("azure" if request.param == "azure" else "google_emulator")
        scheme, bucket = ("az", found.container) if request.param == "azure" else ("gs", found)
        fs = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
        yield f"{scheme}://{bucket}/models/mine", open_store(str(tmp_path / "store"), tmp_path / "cache"), fs
        return
    s3 = request.getfixturevalue("s3")
    url = s3.url if request.param == "s3, the store too" else str(tmp_path / "store")
    fs = fsspec.filesystem("s3", endpoint_url=s3.endpoint, use_listings_cache=False, skip_instance_cache=True)
    yield f"s3://{s3.bucket}/models/mine", open_store(url, tmp_path / "cache"), fs


def remote(fs: Any, to: str) -> dict[str, bytes]:
    root = to.split("://")[1].strip("/")
    files = [path for path in fs.find(root) if path.strip("/") != root and not path.endswith(INDEX)]
    return {path.strip("/").removeprefix(f"{root}/"): fs.cat_file(path) for path in files}


def test_a_bucket_gets_the_files_and_the_next_version(place: tuple[str, Store, Any], tmp_path: Path) -> None:
    to, store, fs = place
    tree, newer = stored(store, tmp_path / "a", MODEL), stored(store, tmp_path / "b", NEWER)
    assert not delivered(to, tree)
    deliver(to, tree, store, "bot")
    assert remote(fs, to) == MODEL
    assert delivered(to, tree)
    deliver(to, newer, store, "bot")
    assert remote(fs, to) == NEWER
    assert delivered(to, newer) and not delivered(to, tree)


def test_a_bucket_with_another_recipes_model_is_refused(place: tuple[str, Store, Any], tmp_path: Path) -> None:
    to, store, fs = place
    deliver(to, stored(store, tmp_path / "a", MODEL), store, "bot")
    with pytest.raises(UserError, match="holds the model of the recipe `bot`, and this one is `experiment`"):
        deliver(to, stored(store, tmp_path / "b", NEWER), store, "experiment")
    assert remote(fs, to) == MODEL


def test_a_bucket_with_other_files_is_refused(place: tuple[str, Store, Any], tmp_path: Path) -> None:
    to, store, fs = place
    fs.pipe_file(f"{to.split('://')[1]}/thesis.txt", b"mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        deliver(to, stored(store, tmp_path / "a", MODEL), store, "bot")
    assert remote(fs, to) == {"thesis.txt": b"mine"}


def test_what_stopped_halfway_is_not_delivered_and_goes_on(place: tuple[str, Store, Any], tmp_path: Path) -> None:
    to, store, fs = place
    tree = stored(store, tmp_path / "a", MODEL)
    root = to.split("://")[1]
    halfway = {**index_document(tree, "bot"), "whole": False}
    halfway["files"]["of-an-earlier-version.txt"] = {}
    fs.pipe_file(f"{root}/{INDEX}", json.dumps(halfway).encode())
    for name in ("config.json", "of-an-earlier-version.txt"):
        fs.pipe_file(f"{root}/{name}", b"half")
    assert not delivered(to, tree)
    deliver(to, tree, store, "bot")
    assert remote(fs, to) == MODEL
    assert delivered(to, tree)


def test_an_interrupted_delivery_remembers_the_version_before(
    store: Store, tree: Tree, newer: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    to, fs = f"memory://{uuid4().hex}/mine", fsspec.filesystem("memory")
    deliver(to, tree, store, "bot")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(type(fs), "put_file", full)
        with pytest.raises(UserError, match="no space left"):
            deliver(to, newer, store, "bot")
    assert not delivered(to, newer) and not delivered(to, tree)
    deliver(to, newer, store, "bot")
    assert remote(fs, to) == NEWER


@pytest.mark.parametrize("looks", range(4))
def test_a_delivery_that_lost_its_turn_writes_no_more_into_the_bucket(looks: int, store: Store, tree: Tree) -> None:
    import fsspec

    to, fs = f"memory://{uuid4().hex}/mine", fsspec.filesystem("memory")
    with pytest.raises(UserError, match="lost"):
        deliver(to, tree, store, "bot", go_on=LostAfter(looks))
    assert len(remote(fs, to)) == max(0, looks - 1) and not delivered(to, tree)
    deliver(to, tree, store, "bot")
    assert remote(fs, to) == MODEL


def test_a_place_that_does_not_answer_is_named(store: Store, tree: Tree) -> None:
    with pytest.raises(UserError, match=r"publish\.to: http://127\.0\.0\.1:9/mine cannot be read: "):
        deliver("http://127.0.0.1:9/mine", tree, store, "bot")
    with pytest.raises(UserError, match=r"publish\.to: ftp://127\.0\.0\.1:9/mine: .*refused"):
        deliver("ftp://127.0.0.1:9/mine", tree, store, "bot")


def test_an_unknown_scheme_is_named(store: Store, tree: Tree) -> None:
    with pytest.raises(UserError, match=r"publish\.to: nowhere://x"):
        deliver("nowhere://x", tree, store, "bot")


def test_a_folder_with_another_recipes_model_is_refused(store: Store, tree: Tree, newer: Tree, tmp_path: Path) -> None:
    to = tmp_path / "mine"
    deliver(str(to), tree, store, "bot")
    with pytest.raises(UserError, match="holds the model of the recipe `bot`, and this one is `experiment`"):
        deliver(str(to), newer, store, "experiment")
    assert contents(to) == MODEL
    index = json.loads((to / INDEX).read_text())
    del index["name"]  # by a version that did not write it
    (to / INDEX).write_text(json.dumps(index))
    deliver(str(to), newer, store, "experiment")
    assert contents(to) == NEWER


# ---- the Hub ----------------------------------------------------------------------------------------------------


class Repository:
    """Answers as HfApi does, out of memory: the Hub itself cannot be reached from a test."""

    def __init__(self, folder: Path, files: Mapping[str, bytes]) -> None:
        self.folder, self.files = folder, dict(files)
        self.private: bool | None = None

    def create_repo(self, name: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        self.private = private

    def list_repo_files(self, name: str) -> list[str]:
        return list(self.files)

    def hf_hub_download(self, name: str, path: str) -> str:
        import httpx
        from huggingface_hub.errors import RemoteEntryNotFoundError

        if path not in self.files:
            response = httpx.Response(404, request=httpx.Request("GET", "https://hub/"))
            raise RemoteEntryNotFoundError("404", response=response)
        (self.folder / "download").write_bytes(self.files[path])
        return str(self.folder / "download")

    def preupload_lfs_files(self, name: str, additions: list[Any]) -> None:
        """All its files are small."""

    def create_commit(self, name: str, operations: list[Any], *, commit_message: str) -> None:
        for operation in operations:
            if hasattr(operation, "path_or_fileobj"):
                source = operation.path_or_fileobj
                self.files[operation.path_in_repo] = source if isinstance(source, bytes) else Path(source).read_bytes()
            else:
                del self.files[operation.path_in_repo]


def test_the_hub_gets_one_commit_and_loses_what_is_old(store: Store, tree: Tree, newer: Tree, tmp_path: Path) -> None:
    api = Repository(tmp_path, {".gitattributes": b""})
    deliver_to_hub("hf://org/mine", tree, store.view(tree), "bot", private=True, api=api)
    with pytest.raises(UserError, match="holds the model of the recipe `bot`"):
        deliver_to_hub("hf://org/mine", newer, store.view(newer), "experiment", private=True, api=api)
    deliver_to_hub("hf://org/mine", newer, store.view(newer), "bot", private=True, api=api)
    assert api.private is True
    assert {k: v for k, v in api.files.items() if k != INDEX} == {".gitattributes": b"", **NEWER}
    assert json.loads(api.files[INDEX])["digest"] == newer.digest


def test_a_delivery_that_lost_its_turn_commits_nothing(store: Store, tree: Tree, tmp_path: Path) -> None:
    api = Repository(tmp_path, {})
    with pytest.raises(UserError, match="lost"):
        deliver_to_hub("hf://org/mine", tree, store.view(tree), "bot", private=True, go_on=LostAfter(0), api=api)
    assert api.files == {}


def test_a_foreign_repository_is_refused(store: Store, tree: Tree, tmp_path: Path) -> None:
    api = Repository(tmp_path, {"model.safetensors": b"theirs"})
    with pytest.raises(UserError, match="regrow did not put there"):
        deliver_to_hub("hf://org/mine", tree, store.view(tree), "bot", private=True, api=api)
    assert api.files == {"model.safetensors": b"theirs"}


def test_offline_the_hub_is_refused_clearly(store: Store, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids it"):
        deliver("hf://org/mine", tree, store, "bot")


# ---- what is delivered ------------------------------------------------------------------------------------------


def test_the_cards_files_go_before_the_models_and_samples_stay(store: Store, tmp_path: Path) -> None:
    weights = stored(store, tmp_path / "w", {"README.md": b"theirs", "config.json": b"{}", "merge.json": b"{}"})
    card = stored(store, tmp_path / "c", {"README.md": b"ours", "gate.json": b"{}", "samples.jsonl": b"data"})
    deliver(str(tmp_path / "out"), delivery(weights, card), store, "bot")
    assert contents(tmp_path / "out") == {"README.md": b"ours", "config.json": b"{}", "gate.json": b"{}"}
    assert os.access(tmp_path / "out" / "config.json", os.W_OK)
