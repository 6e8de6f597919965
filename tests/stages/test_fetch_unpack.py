"""fetch reads packed files and archives as users bring them, and refuses those that are made to do harm."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import convert
from stages.errors import UserError
from stages.identity import tree_of
from stages.sources import unpack
from stages.stage import Work
from tests.stages.chats import smollm2
from tests.stages.fetching import CSV, ROW, bring, home, pieces_of, shards

__all__ = ["home"]


def gz(data: bytes) -> bytes:
    # Without the hour in the header: these bytes are in the tests' names, and two processes have to agree on those.
    return gzip.compress(data, mtime=0)


def zst(data: bytes) -> bytes:
    packed = pa.compress(data, codec="zstd", asbytes=True)
    assert isinstance(packed, bytes)
    return packed


def zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tarred(files: Mapping[str, bytes], **special: bytes) -> bytes:
    """`special`: names by what they are, e.g. `link`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for name in special:
            entry = tarfile.TarInfo(f"{name}.jsonl")
            entry.type, entry.linkname = special[name], "/etc/passwd"
            archive.addfile(entry)
    return buffer.getvalue()


def parquet(count: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["hi"] * count}), buffer)
    return buffer.getvalue()


def brought(home: Path, tmp_path: Path, name: str, data: bytes) -> Path:
    (home / name).write_bytes(data)
    [part] = shards({"files": name})
    return bring(part, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gz(ROW)),
        ("A.JSONL.GZ", gz(ROW)),
        ("two-members.jsonl.gz", gz(ROW[:5]) + gz(ROW[5:])),
        ("a.jsonl.zst", zst(ROW)),
        ("two-frames.jsonl.zst", zst(ROW[:5]) + zst(ROW[5:])),
    ],
)
def test_a_packed_file(home: Path, tmp_path: Path, name: str, data: bytes) -> None:
    assert pieces_of(brought(home, tmp_path, name, data)) == [(1, ROW)]


FILES = {
    "b/train.jsonl": ROW,
    "b/more.csv": CSV,
    "b/list.json.gz": gz(b'[{"text": "hi"}]'),
    "b/packed.jsonl.zst": zst(ROW),
    "table.parquet": parquet(3),
    "README.md": b"about",
    "b/dataset_info.json": b"{}",
    "b/.ipynb_checkpoints/train.jsonl": ROW,
    "__MACOSX/b/._train.jsonl": b"\0\0",
}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.zip", zipped(FILES)),
        ("a.tar", tarred(FILES)),
        ("a.tar.gz", gz(tarred(FILES))),
        ("a.tgz", gz(tarred(FILES))),
        ("a.tar.zst", zst(tarred(FILES))),
    ],
)
def test_an_archive_is_read_file_by_file(home: Path, tmp_path: Path, name: str, data: bytes) -> None:
    output = brought(home, tmp_path, name, data)
    sources = [json.loads(path.read_text()) for path in sorted(output.glob("*/source.json"))]
    assert [source["member"] for source in sources] == [
        "b/train.jsonl",
        "b/more.csv",
        "b/list.json.gz",
        "b/packed.jsonl.zst",
        "table.parquet",
    ]
    assert [path.name for path in sorted(output.glob("*/rows.*"))] == [
        "rows.jsonl",
        "rows.csv",
        "rows.json",
        "rows.jsonl",
        "rows.arrow",
    ]
    assert sorted(path.name for path in output.iterdir()) == [f"{n:05d}" for n in range(5)]


@pytest.mark.parametrize(("name", "make"), [("set.zip", zipped), ("set.tar", tarred)])
def test_an_archive_of_several_splits_is_refused(home: Path, tmp_path: Path, name: str, make: Any) -> None:
    says = "holds test.jsonl, train.jsonl, named after splits: unpack it, and name those of one, e.g. ds/train"
    with pytest.raises(UserError, match=rf"^{name}: ds {says}"):
        brought(home, tmp_path, name, make({"ds/train.jsonl": ROW, "ds/test.jsonl": ROW}))
    assert brought(home, tmp_path / "more", name, make({"ds/train.jsonl": ROW, "ds/train-2.jsonl": ROW}))


@pytest.mark.parametrize("make", [zipped, tarred])
@pytest.mark.parametrize(
    "name", ["../evil.jsonl", "/evil.jsonl", "a/../../evil.jsonl", "..\\evil.jsonl", "C:\\evil.jsonl", "a\nb.jsonl"]
)
def test_a_name_that_leads_out_refuses_the_archive(home: Path, tmp_path: Path, make: object, name: str) -> None:
    data = zipped({"good.jsonl": ROW, name: ROW}) if make is zipped else tarred({"good.jsonl": ROW, name: ROW})
    suffix = "zip" if make is zipped else "tar"
    with pytest.raises(UserError, match=rf"a\.{suffix} holds the name .*evil|a\.{suffix} holds the name 'a\\nb"):
        brought(home, tmp_path, f"a.{suffix}", data)
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_refuse_the_archive(home: Path, tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(UserError, match=r"a\.tar holds 'odd\.jsonl', which is a link or a device"):
        brought(home, tmp_path, "a.tar", tarred({}, odd=kind))


def test_a_link_in_a_zip_refuses_it(home: Path, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("odd.jsonl")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="which is a link or a device"):
        brought(home, tmp_path, "a.zip", buffer.getvalue())


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".zip", ".tar.gz"])
def test_a_bomb_is_refused_before_it_fills_the_disk(
    home: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "ALWAYS", 1 << 20)
    rows = b'{"text": ""}\n' + b" " * (64 << 20)
    data = {
        ".jsonl.gz": lambda: gz(rows),
        ".jsonl.zst": lambda: zst(rows),
        ".zip": lambda: zipped({"a.jsonl": rows}),
        ".tar.gz": lambda: gz(tarred({"a.jsonl": rows})),
    }[suffix]()
    with pytest.raises(UserError, match=r"unpacks to more than 250 times its \d+ bytes"):
        brought(home, tmp_path, f"a{suffix}", data)
    # What had been written by then is thrown away with the attempt.
    assert sum(path.stat().st_size for path in tmp_path.rglob("rows.*")) < 64 << 20


TWO = tarred({"a.jsonl": ROW, "b.jsonl": ROW})  # a header and a block each
DAMAGED = {
    "of-cut-zst.tar": tarred({"a.jsonl.zst": zst(ROW * 99)[:-3]}),
    "a.jsonl.gz": gz(ROW * 99)[:-9],
    "b.jsonl.gz": b"no gzip at all",
    "c.jsonl.gz": gz(ROW * 99)[:20] + b"\xff" * 9 + gz(ROW * 99)[29:],
    "a.jsonl.zst": zst(ROW * 99)[:-3],
    "b.jsonl.zst": b"no zstd at all",
    "a.zip": zipped({"a.jsonl": ROW * 99})[:-30],
    "b.zip": zipped({"a.jsonl": ROW * 99}).replace(b"\x03\x00", b"\x07\x7f", 1)[:40] + b"\0" * 400,
    "a.tar": tarred({"a.jsonl": ROW * 99})[:900],
    "b.tar": b"no tar at all" * 99,
    "at-a-border.tar": TWO[:1024],
    "in-a-header.tar": TWO[:1100],
    "other-bytes.tar": TWO[:1024] + b"x" * 512 + TWO[1536:],
    "at-a-border.tar.gz": gz(TWO[:1024]),
    "at-a-border.tar.zst": zst(TWO[:1024]),
    "a.tar.gz": gz(tarred({"a.jsonl": ROW * 99}))[:-12],
    "a.tar.zst": zst(tarred({"a.jsonl": ROW * 99}))[:-3],
}


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_what_is_damaged_is_told(home: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} is damaged, or cut short"):
        brought(home, tmp_path, name, DAMAGED[name])


def test_a_tar_says_where_it_breaks_off(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.tar is .*byte 1024 begins neither a file nor .*\. Copy it here once more"):
        brought(home, tmp_path, "a.tar", TWO[:1024])


def test_one_block_of_zeros_ends_a_tar(home: Path, tmp_path: Path) -> None:
    output = brought(home, tmp_path, "a.tar", TWO[: 2048 + 512])
    assert pieces_of(output) == [(1, ROW), (1, ROW)]


def test_a_zip_with_a_password(home: Path, tmp_path: Path) -> None:
    data = bytearray(zipped({"a.jsonl": ROW}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag that says it is encrypted
        data[data.index(signature) + offset] |= 1
    with pytest.raises(UserError, match=r"a\.zip cannot be unpacked: .*password"):
        brought(home, tmp_path, "a.zip", bytes(data))


def test_an_archive_without_rows_and_a_file_without_any(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.zip holds no file of rows: expected \.jsonl"):
        brought(home, tmp_path, "a.zip", zipped({"README.md": b"x"}))
    for name, data in {
        "b.jsonl": b"\n \n",
        "c.csv": b"a,b\n",
        "d.json": b"[]",
        "e.jsonl.gz": gz(b"\n"),
    }.items():
        (home / name).write_bytes(data)
        [part] = shards({"files": name})
        with pytest.raises(UserError, match=f"{name}: there are no rows in it"):
            bring(part, tmp_path / f"out-{name}")


def test_the_first_rows_of_several_files_are_the_same_whatever_these_are_called(home: Path, tmp_path: Path) -> None:
    kept = b'{"text": "one"}\n'
    made = []
    for number, names in enumerate([("a.jsonl", "b.jsonl"), ("c.jsonl", os.fsdecode(b"caf\xe9.jsonl"))]):
        (folder := home / str(number)).mkdir()
        for name, data in zip(names, (kept, kept + b"{oops\n"), strict=True):
            (folder / name).write_bytes(data)
        [part] = shards({"files": str(folder), "first": 9})
        output = bring(part, tmp_path / str(number) / "out")
        made.append((part.config, tree_of(output)))
        inputs = {"rows": output / "00001", "tokenizer": smollm2()}
        where = {"name": part.where["name"], "files": [one["name"] for one in part.where["files"]]}
        for said, told in ((where, sorted(names)[1]), ({}, "mine, file 2")):
            with pytest.raises(UserError, match=f"^{told}, line 2: "):
                convert.run(convert.ConvertPart(format="completion"), inputs, tmp_path, Work(tmp_path, where=said))
        config = convert.ConvertPart(format="completion", bad_rows="drop")
        convert.run(config, inputs, tmp_path, Work(tmp_path, where=where))
        assert json.loads((tmp_path / "counts.json").read_text())["places"] == {"not JSON": ["file 2, line 2"]}
    assert made[0] == made[1]


def test_a_bad_row_in_an_archive_is_named_as_it_stands_there(home: Path, tmp_path: Path) -> None:
    good = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    output = brought(home, tmp_path, "a.zip", zipped({"one.jsonl": good, "in/two.jsonl": good + b"{oops\n"}))
    inputs = {"rows": output / "00001", "tokenizer": smollm2()}
    (tmp_path / "converted").mkdir()
    config = convert.ConvertPart.model_validate({"format": "messages"})
    with pytest.raises(UserError, match=r"^a\.zip/in/two\.jsonl, line 2: is not JSON"):
        convert.run(config, inputs, tmp_path / "converted", Work(tmp_path, where={"name": "a.zip"}))
