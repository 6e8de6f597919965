"""Long transfers tell how far they are: to whoever watches, in both directions, up to the last byte."""

import hashlib
import random
import time
from io import DEFAULT_BUFFER_SIZE
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import transfers
from stages.identity import sha256_file
from stages.objects import blob_path
from stages.store import open_store
from stages.transfers import Growing, moving, watching
from tests.conftest import S3
from tests.stages.conftest import MakeAction, MakeFolder

LARGE, SMALL = 40 * 2**20, 1000


def test_both_directions_are_told_up_to_the_last_byte(
    s3: S3, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "LONG", 10 * 2**20)
    monkeypatch.setattr(transfers, "EVERY", 0.0)
    told: list[tuple[str, int, int]] = []
    files = {"large": bytes(LARGE), "small": bytes(SMALL)}
    with watching(lambda *heard: told.append(heard)):
        made = open_store(s3.url, tmp_path / "cache").commit(make_action(), make_folder(files), {}, {})
        open_store(s3.url, tmp_path / "elsewhere").view(made.tree)
    for what in ("uploaded", "downloaded"):
        heard = [(done, total) for which, done, total in told if which == what]
        assert heard[0] == (0, LARGE + SMALL) and heard[-1] == (LARGE + SMALL, LARGE + SMALL)
        assert heard == sorted(heard) and len(heard) > 3


def test_short_ones_are_not_worth_a_bar() -> None:
    told: list[object] = []
    with watching(lambda *heard: told.append(heard)), moving("uploaded", transfers.LONG - 1) as moved:
        moved(transfers.LONG - 1)
    assert told == []


class Small(Growing):
    BLOCK, UNWRITTEN = 4096, 2 * DEFAULT_BUFFER_SIZE


@settings(deadline=None)  # a busy machine is no failure
@given(sizes=st.lists(st.integers(0, 60_000), max_size=12), seed=st.integers(0, 9))
def test_a_file_is_hashed_while_it_grows(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int) -> None:
    path = tmp_path_factory.mktemp("growing") / "file"
    parts = [random.Random(seed + size).randbytes(size) for size in sizes]
    with Small(path) as growing, path.open("wb") as file:
        for part in parts:
            file.write(part)
            growing.grew(len(part))
    assert growing.sha256 == hashlib.sha256(b"".join(parts)).hexdigest()


def test_what_was_not_written_to_its_end_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="away"), Growing(tmp_path / "file") as growing:
        (tmp_path / "file").write_bytes(b"some")
        growing.grew(4)
        raise OSError("the server went away")
    assert growing.sha256 == ""
    with Growing(tmp_path / "nowhere") as growing:
        pass
    assert growing.sha256 == ""


def test_what_broke_off_is_not_read_to_its_end(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(OSError, match="away"), Growing(tmp_path / "file") as growing:
        with (tmp_path / "file").open("wb") as file:
            file.truncate(256 * 2**30)  # it takes no room, and minutes to read
        growing.grew(256 * 2**30)
        raise OSError("the server went away")
    assert growing.sha256 == "" and time.monotonic() - began < 30


def test_a_bucket_tells_the_digest_of_what_it_brought(
    s3: S3, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction
) -> None:
    files = {"large": random.Random(1).randbytes(130 * 2**20), "small": b"little", "empty": b""}  # several ranges
    store = open_store(s3.url, tmp_path / "cache")
    made = store.commit(make_action(), make_folder(files), {}, {})
    for file in made.tree.files:
        found = store.objects.download(blob_path(file.sha256), tmp_path / file.path)
        assert found == file.sha256 == sha256_file(tmp_path / file.path)
