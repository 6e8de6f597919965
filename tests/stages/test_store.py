"""The store as a user of its API meets it: what goes in comes out, verified; what is damaged is told and grows back."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.gc import verify
from stages.identity import Action, File, Tree, sha256_text, tree_of
from stages.manifest import Artifact, encode
from stages.objects import blob_path
from stages.store import BadBlob, Store, open_store

FILES = {"plan.json": b"{}", "shards/00000.arrow": b"\x00\x01" * 500, "shards/ä b.arrow": b"", "copy.json": b"{}"}

MakeFolder = Callable[[dict[str, bytes]], Path]
MakeAction = Callable[..., Action]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def paths(store: Store, prefix: str) -> list[str]:
    return sorted(entry.path for entry in store.objects.list(prefix))


def damage(store: Store, sha256: str, data: bytes) -> None:
    """Put other bytes under a blob's name, behind the store's back."""
    local = store.objects.local(blob_path(sha256))
    if local is None:
        store.objects.put(blob_path(sha256), data)
    else:
        local.chmod(0o644)
        local.write_bytes(data)


def test_what_was_committed_is_found_and_shown(
    any_store: Store, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    action = make_action(length=512, rate=1e-3)
    assert any_store.find("pack", action.key) is None
    artifact = any_store.commit(action, make_folder(FILES), {"rows": 3, "loss": 0.1}, {"host": "here"})
    assert artifact.digest == tree_of(make_folder(FILES)).digest
    found = any_store.find("pack", action.key)
    assert found == artifact
    assert (found.action, found.facts, found.provenance) == (
        action.document,
        {"rows": 3, "loss": 0.1},
        {"host": "here"},
    )
    assert any_store.missing(artifact.tree) == []
    assert contents(any_store.view(artifact.tree)) == FILES
    assert contents(any_store.view(artifact.tree.folder("shards"))) == {
        p.removeprefix("shards/"): d for p, d in FILES.items() if p.startswith("shards/")
    }


def test_a_second_commit_adopts_the_first(any_store: Store, make_folder: MakeFolder, make_action: MakeAction) -> None:
    first = any_store.commit(make_action(), make_folder({"a": b"first"}), {"n": 1}, {})
    assert any_store.commit(make_action(), make_folder({"a": b"second"}), {"n": 2}, {}) == first
    assert any_store.find("pack", first.key) == first


def test_replacing_keeps_the_old_manifest(any_store: Store, make_folder: MakeFolder, make_action: MakeAction) -> None:
    first = any_store.commit(make_action(), make_folder({"a": b"first"}), {}, {})
    second = any_store.commit(make_action(), make_folder({"a": b"second"}), {}, {}, replace=True)
    assert second.digest != first.digest
    assert any_store.find("pack", first.key) == second
    [old] = paths(any_store, "superseded/")
    assert first.digest in old
    assert contents(any_store.view(first.tree)) == {"a": b"first"}


def test_equal_bytes_are_stored_once(any_store: Store, make_folder: MakeFolder, make_action: MakeAction) -> None:
    any_store.commit(make_action(n=1), make_folder({"a": b"same", "b": b"same"}), {}, {})
    any_store.commit(make_action(n=2), make_folder({"c": b"same"}), {}, {})
    assert len(paths(any_store, "blobs/")) == 1


def test_an_empty_artifact_is_one_too(any_store: Store, make_folder: MakeFolder, make_action: MakeAction) -> None:
    artifact = any_store.commit(make_action(), make_folder({}), {}, {})
    assert contents(any_store.view(artifact.tree)) == {}


def test_a_whole_lists_its_parts_and_moves_no_bytes(
    any_store: Store, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    parts = {f"chat/{n}": any_store.commit(make_action(n=n), make_folder({"rows": b"%d" % n}), {}, {}) for n in (0, 1)}
    before = paths(any_store, "blobs/")
    whole = any_store.commit_whole(make_action("fetch"), parts, {"rows": 2}, {})
    assert any_store.find("fetch", whole.key) == whole
    assert paths(any_store, "blobs/") == before
    assert contents(any_store.view(whole.tree)) == {"chat/0/rows": b"0", "chat/1/rows": b"1"}
    assert whole.parts == {name: {"key": part.key, "digest": part.digest} for name, part in parts.items()}


def test_a_whole_cannot_be_made_of_parts_that_are_gone(
    any_store: Store, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    part = any_store.commit(make_action(n=0), make_folder({"rows": b"rows"}), {}, {})
    any_store.objects.delete(blob_path(part.tree.files[0].sha256))
    with pytest.raises(BadBlob) as caught:
        any_store.commit_whole(make_action("fetch"), {"chat/0": part}, {}, {})
    assert caught.value.blobs == {part.tree.files[0].sha256}
    assert any_store.find("fetch", make_action("fetch").key) is None


def test_a_deleted_blob_is_reported_and_grows_back(
    any_store: Store, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    artifact = any_store.commit(make_action(), make_folder(FILES), {}, {})
    gone = next(f for f in artifact.tree.files if f.path == "shards/00000.arrow")
    any_store.objects.delete(blob_path(gone.sha256))
    [told] = any_store.missing(artifact.tree)
    assert "shards/00000.arrow" in told and "missing" in told
    elsewhere = replace(any_store, cache=any_store.cache / "elsewhere")
    with pytest.raises(BadBlob) as caught:
        elsewhere.view(artifact.tree)
    assert caught.value.blobs == {gone.sha256}
    assert any_store.find("pack", artifact.key) == artifact  # the manifest is trusted until its blobs are read
    assert any_store.commit(make_action(), make_folder(FILES), {}, {}).digest == artifact.digest
    assert any_store.missing(artifact.tree) == []
    assert contents(elsewhere.view(artifact.tree)) == FILES


def test_a_winner_whose_blobs_are_gone_is_no_winner(
    any_store: Store, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    first = any_store.commit(make_action(), make_folder({"a": b"first"}), {}, {})
    any_store.objects.delete(blob_path(first.tree.files[0].sha256))
    second = any_store.commit(make_action(), make_folder({"a": b"second"}), {}, {})
    assert contents(any_store.view(second.tree)) == {"a": b"second"}
    assert any_store.find("pack", first.key) == second


@pytest.mark.parametrize("bad", [b"\x00\x01" * 499 + b"\x00\x00", b"short"], ids=["flipped", "truncated"])
def test_a_damaged_blob_is_found_when_it_is_read(
    any_store: Store, make_folder: MakeFolder, make_action: MakeAction, bad: bytes
) -> None:
    artifact = any_store.commit(make_action(), make_folder(FILES), {}, {})
    victim = next(f for f in artifact.tree.files if f.path == "shards/00000.arrow")
    damage(any_store, victim.sha256, bad)
    reader = replace(any_store, cache=any_store.cache / "elsewhere")
    with pytest.raises(BadBlob, match=victim.sha256[:12]) as caught:
        reader.view(artifact.tree)
    assert caught.value.blobs == {victim.sha256}
    [quarantined] = paths(any_store, "quarantine/")
    assert victim.sha256 in quarantined
    assert len(any_store.missing(artifact.tree)) == 1  # so that its stage grows back
    any_store.commit(make_action(), make_folder(FILES), {}, {}, replace=True)
    assert contents(reader.view(artifact.tree)) == FILES


def test_a_file_that_was_verified_is_hashed_again_only_when_it_changed(
    store: Store, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    artifact = store.commit(make_action(), make_folder({"model": b"weights"}), {}, {})
    stored = Path(store.url) / blob_path(artifact.tree.files[0].sha256)
    an_hour_ago = time.time_ns() - 3600 * 10**9
    os.utime(stored, ns=(an_hour_ago, an_hour_ago))
    store.view(artifact.tree)
    stored.chmod(0o644)
    stored.write_bytes(b"weighTs")
    os.utime(stored, ns=(an_hour_ago, an_hour_ago))
    assert contents(store.view(artifact.tree)) == {"model": b"weighTs"}  # not seen, because nobody hashed
    os.utime(stored)
    with pytest.raises(BadBlob):
        store.view(artifact.tree)


def test_a_view_that_lost_a_file_is_made_again(
    any_store: Store, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    artifact = any_store.commit(make_action(), make_folder(FILES), {}, {})
    view = any_store.view(artifact.tree)
    (view / "shards").chmod(0o755)
    (view / "shards" / "00000.arrow").unlink()
    assert contents(any_store.view(artifact.tree)) == FILES
    assert [p.name for p in view.parent.iterdir()] == [artifact.digest]


def test_nothing_can_be_written_through_a_view(store: Store, make_folder: MakeFolder, make_action: MakeAction) -> None:
    view = store.view(store.commit(make_action(), make_folder(FILES), {}, {}).tree)
    for path in [view, *view.rglob("*")]:
        assert path.stat().st_mode & 0o222 == 0, path
    assert all(p.stat().st_mode & 0o222 == 0 for p in (Path(store.url) / "blobs").rglob("*") if p.is_file())


def test_a_model_is_on_disk_once(store: Store, make_folder: MakeFolder, make_action: MakeAction) -> None:
    output = make_folder({"model.safetensors": b"weights"})
    inode = (output / "model.safetensors").stat().st_ino
    artifact = store.commit(make_action(), output, {}, {})
    assert (store.view(artifact.tree) / "model.safetensors").stat().st_ino == inode
    assert (store.view(artifact.tree.under("base")) / "base" / "model.safetensors").stat().st_ino == inode


def test_a_file_that_has_another_name_is_copied(
    store: Store, make_folder: MakeFolder, make_action: MakeAction, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(b"one")
    output = make_folder({})
    os.link(mine, output / "rows.jsonl")
    artifact = store.commit(make_action(), output, {}, {})
    mine.write_bytes(b"two")
    assert contents(store.view(artifact.tree)) == {"rows.jsonl": b"one"}


def test_a_committed_artifact_needs_no_download_on_this_machine(
    s3, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:  # type: ignore[no-untyped-def]
    store = open_store(s3.url, tmp_path / "cache")
    artifact = store.commit(make_action(), make_folder(FILES), {}, {})
    for file in artifact.tree.files:
        store.objects.delete(blob_path(file.sha256))
    assert contents(store.view(artifact.tree)) == FILES


def test_two_hosts_share_one_bucket(s3, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction) -> None:  # type: ignore[no-untyped-def]
    here, there = open_store(s3.url, tmp_path / "here"), open_store(s3.url, tmp_path / "there")
    assert there.find("pack", make_action().key) is None
    artifact = here.commit(make_action(), make_folder(FILES), {}, {})
    assert there.find("pack", artifact.key) == artifact
    assert contents(there.view(artifact.tree)) == FILES
    assert there.swap_ref("model/production", None, {"digest": artifact.digest})
    assert here.read_ref("model/production") == there.read_ref("model/production")
    here.objects.delete(blob_path(artifact.tree.files[0].sha256))
    assert there.missing(artifact.tree)


def test_a_large_file_goes_up_in_parts_and_comes_back(
    s3, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:  # type: ignore[no-untyped-def]
    data = os.urandom(1 << 20) * 40
    artifact = open_store(s3.url, tmp_path / "here").commit(make_action(), make_folder({"model": data}), {}, {})
    assert contents(open_store(s3.url, tmp_path / "there").view(artifact.tree)) == {"model": data}


@pytest.mark.parametrize("name", ["a\\b", "two\nlines", "\x7f"])
def test_file_names_that_some_system_would_misread_are_refused(
    store: Store, make_folder: MakeFolder, make_action: MakeAction, name: str
) -> None:
    with pytest.raises(UserError, match="file name"):
        store.commit(make_action(), make_folder({name: b""}), {}, {})
    assert store.find("pack", make_action().key) is None


def forged(make_action: MakeAction, *files: File, stage: str = "pack", digest: str | None = None) -> bytes:
    artifact = Artifact(make_action(stage).document, make_action(stage).key, Tree(files), {}, {}, {})
    document = json.loads(encode(artifact))
    return json.dumps({**document, "digest": digest or document["digest"]}).encode()


EMPTY = sha256_text("")


@pytest.mark.parametrize(
    "files",
    [
        [File("../escaped", 0, EMPTY)],
        [File("/etc/escaped", 0, EMPTY)],
        [File("a/../../escaped", 0, EMPTY)],
        [File("a\\..\\escaped", 0, EMPTY)],
        [File("a//b", 0, EMPTY)],
        [File("", 0, EMPTY)],
        [File("a", 0, "../../escaped")],
        [File("a", 0, EMPTY), File("a", 0, EMPTY)],
        [File("a", 0, EMPTY), File("a/b", 0, EMPTY)],
    ],
    ids=lambda files: files[-1].path or "empty",
)
def test_a_manifest_cannot_name_files_outside_its_folder(
    store: Store, make_action: MakeAction, files: list[File]
) -> None:
    told: list[str] = []
    store = replace(store, warn=told.append)
    store.objects.create(f"actions/pack/{make_action().key}.json", forged(make_action, *files))
    assert store.find("pack", make_action().key) is None
    assert len(told) == 1 and "quarantine" in told[0]
    with pytest.raises(ValueError):
        store.view(Tree(tuple(files)))


@pytest.mark.parametrize("kind", ["another action", "another stage", "other files", "half a file", "no JSON"])
def test_a_manifest_that_is_not_what_its_name_says_is_a_miss_with_a_reason(
    store: Store, make_folder: MakeFolder, make_action: MakeAction, kind: str
) -> None:
    data = {
        "another action": forged(lambda stage: make_action(stage, other=1)),
        "another stage": forged(lambda stage: make_action("merge")),
        "other files": forged(make_action, digest="0" * 64),
        "half a file": forged(make_action)[:-20],
        "no JSON": b"\xff\xfe",
    }[kind]
    told: list[str] = []
    store = replace(store, warn=told.append)
    key = make_action().key
    store.objects.create(f"actions/pack/{key}.json", data)
    assert store.find("pack", key) is None
    [line] = told
    assert f"actions/pack/{key}.json" in line
    assert len(paths(store, "quarantine/")) == 1 and paths(store, "actions/") == []
    artifact = store.commit(make_action(), make_folder(FILES), {}, {})
    assert store.find("pack", key) == artifact and told == [line]


def test_a_conditional_write_whose_answer_was_lost_is_known_as_ours(s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    objects: Any = open_store(s3.url, tmp_path / "cache").objects
    call = objects.fs.call_s3

    class Deaf:
        """An S3 client that never hears that a PUT went through, and asks again."""

        def __getattr__(self, name: str) -> Any:
            return getattr(objects.fs, name)

        def call_s3(self, method: str, **arguments: Any) -> Any:
            answer = call(method, **arguments)
            if method == "put_object":
                raise ConnectionError("the answer is lost")
            return answer

    deaf = replace(objects, client=Deaf)
    version = deaf.create("refs/a.json", b"1")
    assert version is not None and objects.read("refs/a.json") == (b"1", version)
    assert objects.create("refs/a.json", b"1") is None  # the same bytes, but not ours
    swapped = deaf.swap("refs/a.json", b"2", version)
    assert swapped is not None and objects.read("refs/a.json") == (b"2", swapped)
    assert objects.swap("refs/a.json", b"2", version) is None


def test_refs_move_only_from_where_they_were_seen(any_store: Store) -> None:
    name = "support-bot/production"
    assert any_store.read_ref(name) is None
    assert not any_store.swap_ref(name, '"made-up"', {"digest": "0"})
    assert any_store.swap_ref(name, None, {"digest": "a"})
    assert not any_store.swap_ref(name, None, {"digest": "b"})
    seen = any_store.read_ref(name)
    assert seen is not None and seen.document == {"digest": "a"}
    assert any_store.swap_ref(name, seen.version, {"digest": "c"})
    assert not any_store.swap_ref(name, seen.version, {"digest": "d"})
    now = any_store.read_ref(name)
    assert now is not None and now.document == {"digest": "c"}
    assert list(any_store.refs()) == [name]


@pytest.mark.parametrize("name", ["", "../x", "a//b", "a b", ".hidden", "/a", "ä"])
def test_a_ref_or_run_cannot_be_called_anything(store: Store, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        store.swap_ref(name, None, {})
    with pytest.raises(UserError, match="name"):
        store.write_run(name, {})


def test_runs_come_newest_first(any_store: Store) -> None:
    for name in ("20260101-1", "20260102-1", "20260103-1"):
        any_store.write_run(name, {"status": "running"})
    any_store.write_run("20260103-1", {"status": "finished"})
    assert any_store.read_run("20260103-1") == {"status": "finished"}
    assert any_store.read_run("20260104-1") is None
    assert [name for name, _ in any_store.runs()] == ["20260103-1", "20260102-1", "20260101-1"]


def test_silent_decay_is_found_by_a_deep_look(
    any_store: Store, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    whole = any_store.commit(make_action(n=1), make_folder(FILES), {}, {})
    sick = any_store.commit(make_action(n=2), make_folder({"weights": b"weights"}), {}, {})
    lost = any_store.commit(make_action(n=3), make_folder({"lost": b"lost"}), {}, {})
    any_store.view(sick.tree)
    assert verify(any_store, deep=True).problems == []
    local = any_store.objects.local(blob_path(sick.tree.files[0].sha256))
    times = local.stat() if local else None
    damage(any_store, sick.tree.files[0].sha256, b"weighTs")
    if local and times:  # a disk that decays changes no times
        os.utime(local, ns=(times.st_atime_ns, times.st_mtime_ns))
        local.chmod(0o444)
    any_store.objects.delete(blob_path(lost.tree.files[0].sha256))
    shallow = verify(any_store)
    assert [(p.artifact, p.path) for p in shallow.problems] == [(f"pack/{lost.key}", "lost")]
    deep = verify(any_store, deep=True)
    assert {(p.artifact, p.path) for p in deep.problems} == {
        (f"pack/{lost.key}", "lost"),
        (f"pack/{sick.key}", "weights"),
    }
    assert deep.artifacts == 3
    assert len(paths(any_store, "quarantine/")) == 1
    assert any_store.missing(sick.tree) and not any_store.missing(whole.tree)


def test_opening_and_finding_is_quick_to_import(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, stages.store, stages.lease, stages.checkpoints, stages.gc\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "store = stages.store.open_store(str(folder / 'store'), folder / 'cache')\n"
        "assert store.find('pack', '0' * 64) is None\n"
        "heavy = {'s3fs', 'fsspec', 'botocore', 'aiobotocore', 'torch', 'pydantic', 'prefect', 'numpy'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
