"""gc keeps what is named and never breaks what lives; the store as a whole behaves like a dictionary of folders."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from stages import cache
from stages.checkpoints import latest_checkpoint, save_checkpoint
from stages.errors import UserError
from stages.gc import GRACE, Tally, collect, verify
from stages.identity import Action
from stages.lease import lease
from stages.objects import Entry, blob_path, clock_of
from stages.store import COUNTED_ON, Artifact, BadBlob, Store, open_store

NOW = -5.0
"""A grace that has passed for everything, whatever a server's clock rounds to."""

MakeFolder = Callable[[dict[str, bytes]], Path]
MakeAction = Callable[..., Action]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def elsewhere(store: Store) -> Store:
    """The store as a host sees it that has nothing of it yet."""
    return replace(store, cache=store.cache.with_name(f"{store.cache.name}-elsewhere"))


def age(store: Store, seconds: float, folder: str = "") -> None:
    """Make all objects of a folder store older."""
    then = time.time() - seconds
    for path in (Path(store.url) / folder).rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


@pytest.fixture
def four(any_store: Store, make_folder: MakeFolder, make_action: MakeAction) -> dict[str, Artifact]:
    """Artifacts named by a ref, by an old run that a ref names, by a run, and by nobody."""
    files = {name: {"shared": b"s" * 100, "own": name.encode() * 50} for name in ("ref", "last", "run", "nobody")}
    made = {name: any_store.commit(make_action(name=name), make_folder(f), {}, {}) for name, f in files.items()}
    any_store.swap_ref("model/production", None, {"scores": 1, "of": [{"artifact": made["ref"].digest}]})
    any_store.write_run("20260101-1", {"stages": {"pack": {"key": made["last"].key}}})
    any_store.swap_ref("model/last", None, {"run": "20260101-1"})
    any_store.write_run("20260102-1", {"stages": {"pack": {"key": made["run"].key, "digest": made["run"].digest}}})
    return made


def test_what_a_root_names_stays(any_store: Store, four: dict[str, Artifact]) -> None:
    report = collect(any_store, delete=True, grace=NOW)
    assert report.deleted and report.dangling == []
    assert report.kept == {"pack": Tally(3, 100 + 50 * len("reflastrun"))}
    assert report.swept == {"pack": Tally(1, 50 * len("nobody"))}
    assert report.freed["blobs"] == Tally(1, 50 * len("nobody"))
    assert any_store.find("pack", four["nobody"].key) is None
    for name in ("ref", "last", "run"):
        assert any_store.find("pack", four[name].key) == four[name]
        assert contents(elsewhere(any_store).view(four[name].tree))["own"] == name.encode() * 50
    assert verify(any_store, deep=True).problems == []
    assert collect(any_store, delete=True, grace=NOW).swept == {}


def test_a_dry_run_tells_the_same_and_touches_nothing(any_store: Store, four: dict[str, Artifact]) -> None:
    before = sorted((e.path, e.size) for folder in ("blobs/", "actions/") for e in any_store.objects.list(folder))
    dry = collect(any_store, grace=NOW)
    after = sorted((e.path, e.size) for folder in ("blobs/", "actions/") for e in any_store.objects.list(folder))
    assert before == after and not dry.deleted
    wet = collect(any_store, delete=True, grace=NOW)
    assert replace(dry, deleted=True) == wet


def test_nothing_young_goes(any_store: Store, four: dict[str, Artifact]) -> None:
    report = collect(any_store, delete=True)
    assert report.swept == {} and sum(tally.count for tally in report.freed.values()) == 0
    assert any_store.find("pack", four["nobody"].key) == four["nobody"]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets this machine's clock wrong by so many years; the store's, and the one that nobody sets, stay right."""
    right = time.time

    def set_wrong(years: float) -> None:
        monkeypatch.setattr(time, "time", lambda: right() + years * 365 * 24 * 3600)

    return set_wrong


@pytest.mark.parametrize("any_url", ["folder", "s3"], indirect=True)  # others would have this process's clock
def test_a_clock_that_is_ahead_by_years_makes_nothing_old(
    any_store: Store,
    four: dict[str, Artifact],
    make_folder: MakeFolder,
    make_action: MakeAction,
    set_clock: Callable[[float], None],
) -> None:
    under_way = make_action(name="under way")
    save_checkpoint(any_store, under_way.key, "one", 1, make_folder({"state": b"x"}))
    set_clock(2)
    dry = collect(any_store)
    report = collect(any_store, delete=True)
    assert dry == replace(report, deleted=False)
    in_store = {name: tally.count for name, tally in report.freed.items() if name != "cache"}  # which is a memory only
    assert report.swept == {} and not any(in_store.values())
    assert all(any_store.find("pack", each.key) == each for each in four.values())
    assert latest_checkpoint(any_store, under_way.key) is not None


def test_a_clock_that_is_behind_by_years_takes_no_old_blob_for_young(
    store: Store, make_folder: MakeFolder, make_action: MakeAction, set_clock: Callable[[float], None]
) -> None:
    """gc elsewhere would find it old before the new manifest stands."""
    made = store.commit(make_action(name="first"), make_folder({"shared": b"s"}), {}, {})
    blob = Path(store.url) / blob_path(made.tree.files[0].sha256)
    age(store, GRACE + 60)
    set_clock(-2)
    for commit in ("again", "whole"):
        old = blob.stat().st_mtime
        if commit == "again":
            store.commit(make_action(name=commit), make_folder({"shared": b"s"}), {}, {})
        else:
            store.commit_whole(make_action("convert"), {"chat/0": made}, {}, {})
        assert blob.stat().st_mtime > old + GRACE
        age(store, GRACE + 60)


def test_a_store_s_clock_that_is_set_is_heard_of_within_the_hour(
    store: Store, make_folder: MakeFolder, make_action: MakeAction, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as wrong:
        wrong.setattr("stages.store.clock_of", lambda objects: clock_of(objects) - 2 * 365 * 24 * 3600)
        made = store.commit(make_action(name="first"), make_folder({"shared": b"s"}), {}, {})
    age(store, GRACE + 60)
    blob, steady = Path(store.url) / blob_path(made.tree.files[0].sha256), time.clock_gettime
    old = blob.stat().st_mtime
    monkeypatch.setattr(time, "clock_gettime", lambda which: steady(which) + COUNTED_ON)
    store.commit(make_action(name="again"), make_folder({"shared": b"s"}), {}, {})
    assert blob.stat().st_mtime > old + GRACE


def test_old_runs_that_no_ref_names_keep_nothing(any_store: Store, four: dict[str, Artifact]) -> None:
    collect(any_store, delete=True, run_days=0, grace=NOW)
    assert any_store.find("pack", four["run"].key) is None
    assert any_store.find("pack", four["last"].key) == four["last"]
    assert any_store.read_run("20260102-1") is not None  # the record stays: it is history


def test_a_named_whole_keeps_its_parts(store: Store, make_folder: MakeFolder, make_action: MakeAction) -> None:
    parts = {f"chat/{n}": store.commit(make_action(n=n), make_folder({"rows": b"%d" % n}), {}, {}) for n in range(3)}
    listed = {name: part for name, part in parts.items() if name != "chat/2"}
    whole = store.commit_whole(make_action("convert"), listed, {}, {})
    store.swap_ref("pins/data", None, {"key": whole.key})
    report = collect(store, delete=True, grace=NOW)
    assert report.kept == {"convert": Tally(1, 2), "pack": Tally(2, 2)} and report.swept == {"pack": Tally(1, 1)}
    assert all(store.find("pack", part.key) == part for part in listed.values())
    assert store.missing(whole.tree) == []


def test_a_replaced_artifact_stays_while_a_run_names_its_digest(
    store: Store, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    old = store.commit(make_action(), make_folder({"a": b"old"}), {}, {})
    store.write_run("1", {"stages": {"pack": {"key": old.key, "digest": old.digest}}})
    new = store.commit(make_action(), make_folder({"a": b"new"}), {}, {}, replace=True)
    collect(store, delete=True, grace=NOW)
    assert contents(elsewhere(store).view(old.tree)) == {"a": b"old"}
    collect(store, delete=True, run_days=0, grace=NOW)
    with pytest.raises(BadBlob):
        replace(store, cache=store.cache / "third").view(old.tree)
    assert store.find("pack", new.key) is None


def test_a_ref_that_names_nothing_is_told(store: Store) -> None:
    store.swap_ref("model/production", None, {"digest": "0" * 64})
    assert collect(store).dangling == ["model/production"]


def test_a_manifest_that_cannot_be_read_stops_the_sweep(store: Store, four_in_folder: dict[str, Artifact]) -> None:
    path = f"actions/pack/{four_in_folder['ref'].key}.json"
    store.objects.put(path, b"{")
    with pytest.raises(UserError, match=r"actions/pack/.*regrow verify"):
        collect(store, delete=True, grace=NOW)
    assert len(list(store.objects.list("blobs/"))) == 2
    assert [p.path for p in verify(store).problems] == [path]


def test_what_is_committed_while_it_looks_is_no_damage(
    store: Store, make_folder: MakeFolder, make_action: MakeAction, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(store.objects)
    listed = kind.list

    def and_then_a_commit(objects: Any, prefix: str) -> Iterator[Entry]:
        yield from listed(objects, prefix)
        if prefix == "blobs/":
            store.commit(make_action(name="late"), make_folder({"late": b"late"}), {}, {})

    monkeypatch.setattr(kind, "list", and_then_a_commit)
    report = verify(store)
    assert (report.artifacts, report.problems) == (1, [])


@pytest.fixture
def four_in_folder(store: Store, make_folder: MakeFolder, make_action: MakeAction) -> dict[str, Artifact]:
    return {n: store.commit(make_action(name=n), make_folder({n: n.encode()}), {}, {}) for n in ("ref", "nobody")}


def test_leftovers_go_once_they_are_old(store: Store, make_folder: MakeFolder, make_action: MakeAction) -> None:
    done = store.commit(make_action(), make_folder({"a": b"a"}), {}, {})
    store.swap_ref("pins/done", None, {"key": done.key})
    for key in (done.key, "1" * 64):
        save_checkpoint(store, key, "attempt", 10, make_folder({"weights": b"w"}))
    with lease(store, "train", "2" * 64, 60.0, "me"):
        pass
    (Path(store.url) / "tmp" / "interrupted").write_bytes(b"half")
    age(store, GRACE + 60)
    with lease(store, "train", "3" * 64, 60.0, "me"):
        report = collect(store, delete=True)
        assert [e.path for e in store.objects.list("locks/")] == [f"locks/train/{'3' * 64}.json"]
    assert report.freed["unfinished"].count == 1 and not list(store.objects.list("tmp/"))
    assert report.freed["checkpoints"].count == 2
    assert latest_checkpoint(store, done.key) is None
    assert latest_checkpoint(store, "1" * 64) is not None  # its work may go on
    age(store, 40 * 24 * 3600)
    collect(store, delete=True)
    assert latest_checkpoint(store, "1" * 64) is None
    assert store.missing(done.tree) == []


def test_interrupted_uploads_to_a_bucket_are_ended(s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = open_store(s3.url, tmp_path / "cache")
    fs: Any = store.objects.fs  # type: ignore[attr-defined]
    fs.call_s3("create_multipart_upload", Bucket=s3.bucket, Key="store/blobs/sha256/ab/half")
    assert collect(store, delete=True).freed["unfinished"].count == 0
    assert collect(store, grace=NOW).freed["unfinished"].count == 1
    assert collect(store, delete=True, grace=NOW).freed["unfinished"].count == 1
    assert collect(store, grace=NOW).freed["unfinished"].count == 0


def test_an_upload_that_is_gone_on_with_is_not_ended(s3, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = open_store(s3.url, tmp_path / "cache")
    fs: Any = store.objects.fs  # type: ignore[attr-defined]
    where = {"Bucket": s3.bucket, "Key": "store/blobs/sha256/ab/half"}
    where["UploadId"] = fs.call_s3("create_multipart_upload", **where)["UploadId"]
    [begun] = fs.call_s3("list_multipart_uploads", Bucket=s3.bucket, Prefix="store/")["Uploads"]
    sent = begun["Initiated"]
    while sent.timestamp() < begun["Initiated"].timestamp() + 1:  # servers tell times in whole seconds
        fs.call_s3("upload_part", **where, PartNumber=1, Body=b"some")
        sent = max(part["LastModified"] for part in fs.call_s3("list_parts", **where)["Parts"])
    assert store.objects.unfinished(sent.timestamp(), True) == 0
    assert store.objects.unfinished(sent.timestamp() + 1, True) == 1
    assert store.objects.unfinished(sent.timestamp() + 1, True) == 0


def test_local_views_that_nobody_asked_for_go(
    s3, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:  # type: ignore[no-untyped-def]
    store = open_store(s3.url, tmp_path / "cache")
    with store.hold() as hold:
        old = store.view(store.commit(make_action(n=1), make_folder({"a": b"a", "both": b"b"}), {}, {}).tree, hold)
        new = store.view(store.commit(make_action(n=2), make_folder({"both": b"b"}), {}, {}).tree, hold)
    shutil.rmtree(tmp_path / "outputs")  # as a build does: then only the view uses the cached blob
    long_ago = time.time() - 20 * 24 * 3600
    for path in (tmp_path / "cache").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    store.view(store.find("pack", make_action(n=2).key).tree)  # type: ignore[union-attr]
    assert collect(store).freed["cache"] == collect(store, delete=True).freed["cache"]
    assert not old.exists() and contents(new) == {"both": b"b"}
    assert len([p for p in (tmp_path / "cache" / "blobs").rglob("*") if p.is_file()]) == 1


def test_what_broke_off_on_this_machine_goes_once_it_is_old_and_nobody_is_at_it(store: Store) -> None:
    work = store.cache / "work" / "train"
    kept = [store.cache / "begun" / "busy", work / "busy" / "checkpoints" / ".fetching-3-one" / "weights"]
    gone = [store.cache / "begun" / "old", work / "old" / "checkpoints" / ".fetching-3-one" / "weights"]
    for path in (*kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
    long_ago = time.time() - 20 * 24 * 3600
    for path in store.cache.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    young = work / "young" / "checkpoints" / ".fetching-3-one" / "weights"
    young.parent.mkdir(parents=True)
    young.write_bytes(bytes(1000))
    with cache.begun(store.cache, "busy"), cache.if_free(work / "busy" / "lock") as free:
        assert free
        assert collect(store).freed["cache"] == collect(store, delete=True).freed["cache"] == Tally(2, 2000)
        assert all(path.exists() for path in (*kept, young)) and not any(path.exists() for path in gone)
    assert collect(store, delete=True).freed["cache"] == Tally(2, 2000)
    assert not list(work.glob("busy/checkpoints/*")) and young.exists()


class Dictionary(RuleBasedStateMachine):
    """A store against a model: a dictionary from actions to folders' contents, and a set of what is named."""

    keys = Bundle("keys")

    @initialize(kind=st.sampled_from(["folder", "memory"]))
    def open(self, kind: str) -> None:
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        url = str(self.folder / "store") if kind == "folder" else f"memory://{self.folder.name}"
        self.store = open_store(url, self.folder / "cache")
        self.expected: dict[int, dict[str, bytes]] = {}
        self.named: set[str] = set()
        self.outputs = 0

    def teardown(self) -> None:
        self.temporary.cleanup()

    def action(self, n: int) -> Action:
        return Action("pack", {"pack": 1}, {"n": n}, {})

    def output(self, files: dict[str, bytes]) -> Path:
        self.outputs += 1
        folder = self.folder / f"output{self.outputs}"
        folder.mkdir()
        for path, data in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(data)
        return folder

    def whole(self, files: dict[str, bytes]) -> bool:
        """Whether the blobs of some files are all there."""
        import hashlib

        return all(self.store.objects.stat(blob_path(hashlib.sha256(d).hexdigest())) for d in files.values())

    contents = st.dictionaries(
        st.sampled_from(["a", "b", "in/c"]), st.sampled_from([b"", b"x", b"y", b"xy" * 300]), max_size=3
    )

    @rule(target=keys, n=st.integers(0, 5), files=contents, force=st.booleans())
    def commit(self, n: int, files: dict[str, bytes], force: bool) -> int:
        standing = self.expected.get(n)
        wins = force or standing is None or not self.whole(standing)
        artifact = self.store.commit(self.action(n), self.output(files), {"n": n}, {}, replace=force)
        if wins:
            self.expected[n] = files
        assert {f.path for f in artifact.tree.files} == set(self.expected[n])
        return n

    @rule(n=keys)
    def name(self, n: int) -> None:
        artifact = self.store.find("pack", self.action(n).key)
        if artifact and self.store.swap_ref(f"pins/{artifact.key[:12]}", None, {"key": artifact.key}):
            self.named.add(artifact.key)

    @rule(n=keys, which=st.integers(0, 2))
    def lose_a_blob(self, n: int, which: int) -> None:
        artifact = self.store.find("pack", self.action(n).key)
        if artifact and artifact.tree.files:
            file = artifact.tree.files[which % len(artifact.tree.files)]
            self.store.objects.delete(blob_path(file.sha256))

    @rule()
    def sweep(self) -> None:
        collect(self.store, delete=True, grace=NOW)
        self.expected = {n: f for n, f in self.expected.items() if self.action(n).key in self.named}
        listed = {
            file.sha256
            for n in self.expected
            if (found := self.store.find("pack", self.action(n).key))
            for file in found.tree.files
        }
        assert {e.path.rpartition("/")[2] for e in self.store.objects.list("blobs/")} <= listed

    @rule(target=keys, names=st.lists(keys, min_size=1, max_size=2, unique=True))
    def join(self, names: list[int]) -> Any:
        parts = {str(n): found for n in names if (found := self.store.find("pack", self.action(n).key))}
        action = Action("convert", {}, {"parts": {n: p.key for n, p in parts.items()}}, {})
        if all(self.whole(self.expected[int(n)]) for n in parts):
            whole = self.store.commit_whole(action, parts, {}, {}, replace=True)
            joined = {f"{n}/{p}": d for n in parts for p, d in self.expected[int(n)].items()}
            assert contents(self.store.view(whole.tree)) == joined
        else:
            with pytest.raises(BadBlob):
                self.store.commit_whole(action, parts, {}, {}, replace=True)
        return multiple()

    @invariant()
    def agrees(self) -> None:
        for n in range(6):
            found = self.store.find("pack", self.action(n).key)
            assert (found is not None) == (n in self.expected)
            if found is None:
                continue
            missing = self.store.missing(found.tree)
            assert (missing == []) == self.whole(self.expected[n])
            if not missing:
                assert contents(self.store.view(found.tree)) == self.expected[n]


Dictionary.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
test_the_store_is_a_dictionary_of_folders = Dictionary.TestCase


@pytest.mark.full
def test_the_store_is_a_dictionary_of_folders_at_length() -> None:
    run_state_machine_as_test(Dictionary, settings=settings(max_examples=300, stateful_step_count=40, deadline=None))


def test_a_report_is_json_for_machines(store: Store) -> None:
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(collect(store))))["deleted"] is False
    assert json.loads(json.dumps(asdict(verify(store))))["problems"] == []
