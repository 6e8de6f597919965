"""A transfer that broke off goes on where it was, in the same process or another, and damage on the way is found."""

import hashlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import cache
from stages.checkpoints import fetch_checkpoint, save_checkpoint
from stages.errors import UserError
from stages.identity import Action, sha256_file, tree_of
from stages.manifest import Artifact
from stages.objects import blob_path, open_objects, ranges, s3_parts
from stages.objects import s3 as s3_objects
from stages.objects.ranges import Piece, all_from, download_in_ranges
from stages.objects.s3_parts import MOST_PARTS, parts_of, upload_in_parts
from stages.store import Store, open_store
from stages.transfers import Moved, nobody
from tests.conftest import S3
from tests.stages.conftest import MakeAction, MakeFolder
from tests.stages.faulty_proxy import FaultyProxy, faulty_proxy
from tests.stages.test_store_races import drive
from tests.stages.web_server import Page, web_server

MIB = 2**20
SIZE = 13 * MIB
"""Three parts, and as many ranges as MiB, where both are `small`."""
LARGE = 72 * MIB
"""Several parts and ranges of the usual sizes."""
KINDS = pytest.mark.parametrize(
    "bucket",
    ["s3", pytest.param("google", marks=pytest.mark.full), pytest.param("azure", marks=pytest.mark.full)],
    indirect=True,
)


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(getattr(request, "param", "s3"))


@pytest.fixture
def proxy(bucket: Any) -> Iterator[FaultyProxy]:
    parts = urlsplit(bucket.endpoint)
    with faulty_proxy(f"{parts.scheme}://{parts.netloc}") as proxy:
        yield proxy


def through(proxy: FaultyProxy, bucket: Any, folder: Path, **options: str) -> Store:
    how = bucket.through(proxy.endpoint) if hasattr(bucket, "through") else {"endpoint_url": proxy.endpoint}
    return open_store(bucket.url, folder, how | options)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts as small as S3 takes them, and smaller ranges, so that a test need not move much."""
    monkeypatch.setattr(s3_objects, "SINGLE_PUT", 5 * MIB)
    monkeypatch.setattr(s3_parts, "SINGLE_PUT", 5 * MIB)
    monkeypatch.setattr(ranges, "RANGE", MIB)


@pytest.fixture
def source(tmp_path: Path, small: None) -> Path:
    (tmp_path / "model").write_bytes(random.Random(0).randbytes(SIZE))
    return tmp_path / "model"


@pytest.fixture
def at_once_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody sends to at this moment has broken off."""
    monkeypatch.setattr(s3_parts, "QUIET", 0.0)


def begun(s3: S3, store: Store, source: Path, *sent: bytes) -> str:
    """An upload of the file's blob that has these parts; its id."""
    fs: Any = store.objects.fs  # type: ignore[attr-defined]
    where = {"Bucket": s3.bucket, "Key": f"store/{blob_path(sha256_file(source))}"}
    upload = str(fs.call_s3("create_multipart_upload", **where)["UploadId"])
    for number, body in enumerate(sent, 1):
        fs.call_s3("upload_part", **where, UploadId=upload, PartNumber=number, Body=body)
    return upload


def cut(source: Path) -> list[bytes]:
    data = source.read_bytes()
    return [data[part.start : part.start + part.size] for part in parts_of(len(data))]


def holds(store: Store, source: Path, back: Path) -> bool:
    """Whether the store has the file's blob, with its bytes."""
    return store.objects.download(blob_path(sha256_file(source)), back) == sha256_file(source)


@settings(deadline=None)
@given(size=st.integers(1, 6 * 2**40))
def test_parts_cover_a_file_and_are_not_too_many(size: int) -> None:
    parts = parts_of(size)
    assert len(parts) <= MOST_PARTS and parts[0].start == 0 and parts[-1].start + parts[-1].size == size
    assert all(a.start + a.size == b.start and a.number + 1 == b.number for a, b in pairwise(parts))
    assert {part.size for part in parts[:-1]} <= {parts[0].size} and 0 < parts[-1].size <= parts[0].size
    assert len(parts) == 1 or (parts[0].size >= 16 * MIB and parts[0].size % MIB == 0)


@pytest.mark.usefixtures("at_once_quiet")
def test_only_the_parts_that_are_missing_or_differ_are_sent(
    s3: S3, proxy: FaultyProxy, source: Path, tmp_path: Path
) -> None:
    store, (first, second, third) = through(proxy, s3, tmp_path / "cache"), cut(source)
    begun(s3, store, source, first)
    upload = begun(s3, store, source, first, second[::-1], third)  # somebody else's bytes, or damaged ones
    begun(s3, store, source, first[:-1])
    proxy.carried.clear()
    moved: list[int] = []
    store.objects.upload(source, blob_path(sha256_file(source)), sha256_file(source), moved.append)
    assert len(second) <= proxy.carried["PUT"] < len(second) + MIB
    assert sum(moved) == SIZE
    assert holds(store, source, tmp_path / "back")
    fs: Any = store.objects.fs  # type: ignore[attr-defined]
    left = fs.call_s3("list_multipart_uploads", Bucket=s3.bucket, Prefix="store/")["Uploads"]
    assert len(left) == 2 and upload not in {one["UploadId"] for one in left}, "the one with most was gone on with"


def test_an_upload_that_somebody_is_at_is_left_alone(s3: S3, proxy: FaultyProxy, source: Path, tmp_path: Path) -> None:
    store = through(proxy, s3, tmp_path / "cache")
    upload = begun(s3, store, source, cut(source)[0])
    proxy.carried.clear()
    store.objects.upload(source, blob_path(sha256_file(source)), sha256_file(source))
    assert proxy.carried["PUT"] >= SIZE and holds(store, source, tmp_path / "back")
    fs: Any = store.objects.fs  # type: ignore[attr-defined]
    where = {"Bucket": s3.bucket, "Key": f"store/{blob_path(sha256_file(source))}"}
    assert len(fs.call_s3("list_parts", **where, UploadId=upload)["Parts"]) == 1


@pytest.mark.usefixtures("at_once_quiet")
def test_who_shares_an_upload_that_another_ends_finds_the_object(s3: S3, source: Path, tmp_path: Path) -> None:
    store = open_store(s3.url, tmp_path / "cache")
    objects: Any = store.objects
    begun(s3, store, source, cut(source)[0])
    key, asked = objects.place.key(blob_path(sha256_file(source))), []

    def call(operation: str, **arguments: Any) -> Any:
        asked.append((operation, arguments.get("PartNumber")))
        if operation == "upload_part" and arguments["PartNumber"] == 3:
            upload_in_parts(objects._call, key, source, nobody)  # the same one, to its end
        return objects._call(operation, **arguments)

    moved: list[int] = []
    upload_in_parts(call, key, source, moved.append)
    assert ("upload_part", 3) in asked and asked[-1] == ("head_object", None)
    assert not [one for one in asked if one[0].startswith(("create", "complete"))]
    assert sum(moved) == SIZE and holds(store, source, tmp_path / "back")


def test_an_upload_that_is_swept_meanwhile_is_begun_anew(s3: S3, source: Path, tmp_path: Path) -> None:
    store = open_store(s3.url, tmp_path / "cache")
    objects: Any = store.objects
    key = objects.place.key(blob_path(sha256_file(source)))
    swept: list[object] = []

    def call(operation: str, **arguments: Any) -> Any:
        if operation == "complete_multipart_upload" and not swept:
            swept.append(objects._call("abort_multipart_upload", Key=key, UploadId=arguments["UploadId"]))
        return objects._call(operation, **arguments)

    moved: list[int] = []
    upload_in_parts(call, key, source, moved.append)
    assert swept and sum(moved) == SIZE and holds(store, source, tmp_path / "back")


def test_several_upload_the_same_at_once(s3: S3, source: Path, tmp_path: Path) -> None:
    stores = [open_store(s3.url, tmp_path / str(n)) for n in range(3)]
    sha256 = sha256_file(source)
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(store.objects.upload, source, blob_path(sha256), sha256) for store in stores]:
            done.result()
    assert holds(stores[0], source, tmp_path / "back")
    assert stores[0].objects.unfinished(float("inf"), False) == 0


@pytest.mark.usefixtures("at_once_quiet")
@pytest.mark.parametrize("denied", ["ListBucketMultipartUploads", "ListMultipartUploadParts"])
def test_a_key_that_may_not_list_uploads_sends_all(
    s3: S3, proxy: FaultyProxy, source: Path, tmp_path: Path, denied: str
) -> None:
    store = through(proxy, s3, tmp_path / "cache")
    begun(s3, store, source, cut(source)[0])
    s3.forbid(denied)
    proxy.carried.clear()
    store.objects.upload(source, blob_path(sha256_file(source)), sha256_file(source))
    assert proxy.carried["PUT"] >= SIZE and holds(store, source, tmp_path / "back")


@pytest.mark.failure(
    what="bytes of a large file change on their way to the bucket",
    outcome="the server refuses the part, and it is sent again",
)
def test_a_part_that_arrives_damaged_is_sent_again(s3: S3, proxy: FaultyProxy, source: Path, tmp_path: Path) -> None:
    store = through(proxy, s3, tmp_path / "cache")
    proxy.faults, proxy.share = ("garble",), 0.5
    store.objects.upload(source, blob_path(sha256_file(source)), sha256_file(source))
    assert proxy.suffered["garble"] and proxy.carried["PUT"] > SIZE + MIB
    proxy.faults = ()
    assert holds(store, source, tmp_path / "back")


def test_damage_that_does_not_end_is_told_for_what_it_is(proxy: FaultyProxy, s3: S3, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(random.Random(0).randbytes(2 * MIB))
    store = through(proxy, s3, tmp_path / "cache").hasty()
    proxy.faults, proxy.share = ("garble",), 1.0
    sha256 = sha256_file(tmp_path / "file")
    with pytest.raises(UserError, match="the server got other bytes than were hashed here") as told:
        store.objects.upload(tmp_path / "file", blob_path(sha256), sha256)
    assert "cannot be reached" not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.failure(
    what="a process is killed half way through the upload of a large file to S3",
    outcome="after a minute without a new part the next upload, by whatever machine, sends only the parts that are "
    "missing",
)
@pytest.mark.usefixtures("at_once_quiet")
@pytest.mark.full
def test_a_process_killed_in_an_upload_is_gone_on_for(s3: S3, proxy: FaultyProxy, tmp_path: Path) -> None:
    store, source = through(proxy, s3, tmp_path / "cache"), tmp_path / "model"
    source.write_bytes(os.urandom(LARGE))
    with drive("upload", s3.url, tmp_path, source) as dies:
        assert dies.wait() == -signal.SIGKILL
    proxy.carried.clear()
    store.objects.upload(source, blob_path(sha256_file(source)), sha256_file(source))
    assert proxy.carried["PUT"] < LARGE // 2 and holds(store, source, tmp_path / "back")


@settings(deadline=None)
@given(
    size=st.integers(0, 200),
    breaks=st.lists(st.integers(0, 12), max_size=6),
    seed=st.integers(0, 5),
    unknown=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_download_that_breaks_off_any_number_of_times_ends_whole(
    tmp_path_factory: pytest.TempPathFactory, size: int, breaks: list[int], seed: int, unknown: float
) -> None:
    """Also where some (`unknown`) or all of the servers that answer know no ranges."""
    target = tmp_path_factory.mktemp("broken") / "file"
    data, came = random.Random(seed).randbytes(size), 0

    def ask_until(left: int | None) -> Callable[[int, int], Piece | None]:
        answers = iter(range(left)) if left is not None else None

        def ask(start: int, stop: int) -> Piece | None:
            if answers is not None and next(answers, None) is None:
                raise ConnectionError
            if random.Random(seed + start).random() < unknown:
                return all_from(start, data)
            return Piece(data[start:stop], size) if start < size else None

        return ask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "RANGE", 16)
        for left in breaks:
            try:
                assert download_in_ranges(ask_until(left), target, nobody) == hashlib.sha256(data).hexdigest()
            except ConnectionError:
                assert data.startswith(target.read_bytes()) and target.stat().st_size >= came
            came = target.stat().st_size
        moved: list[int] = []
        assert download_in_ranges(ask_until(None), target, moved.append) == hashlib.sha256(data).hexdigest()
    assert target.read_bytes() == data and sum(moved) == size


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ranges_known", [True, False])
@pytest.mark.parametrize("there", [0, 3 * MIB, SIZE])
def test_a_server_that_knows_no_ranges_or_refuses_them_without_a_word_still_gives_all(
    tmp_path: Path, there: int, ranges_known: bool
) -> None:
    data, target = random.Random(0).randbytes(SIZE), tmp_path / "model"
    target.write_bytes(data[:there])
    with web_server() as web:
        web.pages["/bucket/store/model"] = Page(data, ranges=ranges_known)
        web.pages["/bucket/store/empty"] = Page(b"", ranges=ranges_known)
        how = {"endpoint_url": web.url, "key": "key", "secret": "secret"}
        objects = open_objects("s3://bucket/store", how, reached=True)
        assert objects.download("model", target) == hashlib.sha256(data).hexdigest()
        assert objects.download("empty", tmp_path / "empty") == hashlib.sha256().hexdigest()
    assert target.read_bytes() == data


def made(store: Store, make_folder: MakeFolder, action: Action, size: int = SIZE) -> Artifact:
    files = {"model": random.Random(1).randbytes(size), "small": b"little"}
    return store.commit(action, make_folder(files), {}, {})


def left(folder: Path) -> list[Path]:
    return sorted((folder / "begun").iterdir())


@dataclass(frozen=True)
class Cut:
    """Objects behind a proxy that carries nothing more once a number of bytes came."""

    objects: Any
    proxy: FaultyProxy
    after: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objects, name)

    def download(self, path: str, target: Path, moved: Moved) -> Any:
        def heard(more: int) -> None:
            moved(more)
            if self.proxy.carried["GET"] > self.after:
                self.proxy.faults, self.proxy.share = ("500",), 1.0

        return self.objects.download(path, target, heard)


@contextmanager
def cut_after(size: int, store: Store, proxy: FaultyProxy) -> Iterator[Store]:
    """The store, for whom all breaks off in this block after so many bytes more."""
    objects: Any = Cut(store.objects.hasty(), proxy, proxy.carried["GET"] + size)
    with pytest.raises(UserError, match="cannot be reached"):
        yield replace(store, objects=objects)
    proxy.faults = ()
    proxy.carried.clear()


@pytest.mark.failure(
    what="the network breaks off the download of a large file for good",
    outcome="the next try asks only for what is missing; what was damaged meanwhile is fetched anew",
)
@KINDS
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("tampered", [False, True])
def test_a_download_goes_on_where_it_broke_off(
    bucket: Any,
    proxy: FaultyProxy,
    tmp_path: Path,
    make_folder: MakeFolder,
    make_action: MakeAction,
    caplog: pytest.LogCaptureFixture,
    tampered: bool,
) -> None:
    artifact = made(open_store(bucket.url, tmp_path / "first"), make_folder, make_action())
    store = through(proxy, bucket, tmp_path / "cache")
    with cut_after(SIZE // 3, store, proxy) as cutting:
        cutting.view(artifact.tree)
    [part] = left(tmp_path / "cache")
    there = part.stat().st_size
    assert 0 < there < SIZE
    if tampered:
        with part.open("r+b") as file:
            file.seek(there // 2)
            file.write(b"tampered")
    assert tree_of(store.view(artifact.tree)).digest == artifact.digest
    again = SIZE if tampered else 0
    assert SIZE - there + again <= proxy.carried["GET"] < SIZE - there + again + MIB
    assert ("what an earlier download left" in caplog.text) is tampered and not left(tmp_path / "cache")
    assert not list(store.objects.list("quarantine/"))


@pytest.mark.failure(
    what="a process is killed half way through the download of a large file",
    outcome="the next one on this machine asks only for what is missing",
)
@pytest.mark.full
def test_a_process_killed_in_a_download_is_gone_on_for(
    s3: S3, proxy: FaultyProxy, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    artifact = made(open_store(s3.url, tmp_path / "first"), make_folder, make_action(), LARGE)
    with drive("view", s3.url, tmp_path, artifact.key) as dies:
        assert dies.wait() == -signal.SIGKILL
    store = through(proxy, s3, tmp_path / "dying")
    assert tree_of(store.view(artifact.tree)).digest == artifact.digest
    assert proxy.carried["GET"] < LARGE // 2 and not left(tmp_path / "dying")


@pytest.mark.usefixtures("small")
def test_a_checkpoint_goes_on_where_it_broke_off(s3: S3, proxy: FaultyProxy, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "saved").mkdir(exist_ok=True)
        (tmp_path / "saved" / name).write_bytes(random.Random(name).randbytes(SIZE // 2))
    direct = open_store(s3.url, tmp_path / "cache")
    wanted = tree_of(tmp_path / "saved").digest
    checkpoint = save_checkpoint(direct, "0" * 64, "attempt", 20, tmp_path / "saved")
    work, store = tmp_path / "work", through(proxy, s3, tmp_path / "cache")
    (work / ".fetching-10-attempt").mkdir(parents=True)  # of an older one
    with cut_after(SIZE * 3 // 5, store, proxy) as cutting:
        fetch_checkpoint(cutting, checkpoint, work / "20")
    fetch_checkpoint(store, checkpoint, work / "20")
    assert tree_of(work / "20").digest == wanted and proxy.carried["GET"] < SIZE // 2 + MIB
    assert [path.name for path in work.iterdir()] == ["20"]


def test_what_broke_off_counts_and_goes_like_any_copy(tmp_path: Path) -> None:
    for name, age in (("old", 100), ("new", 50), ("busy", 200)):
        with cache.begun(tmp_path, name) as part:
            part.write_bytes(bytes(1000))
        os.utime(part, ns=(10**18 - age, 10**18 - age))
    with cache.begun(tmp_path, "busy") as part, cache.begun(tmp_path, "busy") as own:
        own.write_bytes(bytes(1000))
        assert part.read_bytes() == bytes(1000) and own != part
        assert cache.size_of(tmp_path) == 2000, "whoever is at a download has room reserved for it"
        assert cache.make_room(tmp_path, 500, 1500)
        assert [path.name for path in left(tmp_path)] == sorted(["busy", own.name, "new"])
    assert [path.name for path in left(tmp_path)] == ["busy", "new"], "nobody could go on with one's own"
    assert cache.size_of(tmp_path) == 2000 and cache.broke_off(tmp_path, "busy")
    with cache.begun(tmp_path, "nothing came"):
        pass
    assert not cache.broke_off(tmp_path, "nothing came")
