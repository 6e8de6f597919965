"""fetch cuts files into pieces between rows: nothing is lost, nothing moves, and memory holds a row and a chunk."""

import csv
import io
import json
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.errors import UserError
from stages.formats import BadRow
from stages.rows import read_rows
from stages.sources import batches as batches_module
from stages.sources import pieces as pieces_module
from stages.sources.batches import batches, cut_batches
from stages.sources.pieces import Pieces, cut
from tests.stages.fetching import bring, home, pieces_of, shards

__all__ = ["home"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 64 bytes, read 16 bytes at a time: every border is met."""
    monkeypatch.setattr(pieces_module, "PIECE", 64)
    monkeypatch.setattr(pieces_module, "CHUNK", 16)


def cut_into(folder: Path, data: bytes, suffix: str, first: int | None = None) -> Path:
    folder.mkdir(parents=True)
    cut(io.BytesIO(data), suffix, Pieces(folder, {"source": "mine", "split": "train"}, f"a{suffix}", left=first))
    return folder


def rows_of(output: Path) -> list[tuple[str, Any]]:
    """All rows as convert reads them: (place in the file, row)."""
    found: list[Any] = []
    before: dict[Any, int] = {}
    for piece in sorted(output.iterdir()):
        (path,) = piece.glob("rows.*")
        source = json.loads((piece / "source.json").read_text())
        file = source.get("file"), source.get("member")
        assert source.get("rows_before", source["first"] - 1) == before.get(file, 0)
        rows = list(read_rows(path, path.name, source["first"]))
        before[file] = before.get(file, 0) + len(rows)
        found += rows
    return [(place, str(row) if isinstance(row, BadRow) else row) for place, row in found]


def rows_whole(folder: Path, data: bytes, suffix: str) -> list[tuple[str, Any]]:
    """The same of the file before it was cut: what must come out."""
    (folder / f"whole{suffix}").write_bytes(data)
    found = list(read_rows(folder / f"whole{suffix}", "whole"))
    return [(place, str(row) if isinstance(row, BadRow) else row) for place, row in found]


texts = st.text(st.sampled_from('ab ,"\n\r[]{}\\é漢🙂\u2028'), max_size=40)
values = st.one_of(texts, st.integers(-99, 99), st.none(), st.lists(texts, max_size=2), st.floats(allow_nan=False))
rows = st.lists(st.dictionaries(st.sampled_from("abc"), values, min_size=1), max_size=12)
blanks = st.lists(st.sampled_from(["", " ", "\t", "\r"]), max_size=3).map("\n".join)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A new folder for every example."""
    return lambda: tmp_path_factory.mktemp("example")


@FEW
@given(rows=rows, blank=blanks, ending=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(), end=st.booleans())
def test_json_lines_in_pieces_are_the_same_rows_in_the_same_places(
    place: Any, rows: Any, blank: str, ending: str, bom: bool, end: bool
) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    data = ("\ufeff" * bom + blank + f"{ending}{blank}{ending}".join(lines) + ending * end).encode()
    folder = place()
    output = cut_into(folder / "out", data, ".jsonl")
    assert rows_of(output) == rows_whole(folder, data, ".jsonl")
    # All bytes are there but the blank ones between pieces, and no piece is blank.
    assert b"".join(piece for _, piece in pieces_of(output)).split() == data.split()
    assert all(piece.removeprefix(b"\xef\xbb\xbf").strip() for _, piece in pieces_of(output)) or not rows


@FEW
@given(rows=rows, more=rows)
def test_rows_that_are_appended_make_only_the_last_piece_anew(place: Any, rows: Any, more: Any) -> None:
    before, after = (b"".join(json.dumps(row).encode() + b"\n" for row in part) for part in (rows, rows + more))
    folder = place()
    old, new = (pieces_of(cut_into(folder / name, d, ".jsonl")) for name, d in (("a", before), ("b", after)))
    assert old[:-1] == new[: max(0, len(old) - 1)]


@FEW
@given(rows=rows, indent=st.sampled_from([None, 1]), bom=st.booleans(), space=st.sampled_from(["", " \n"]))
def test_a_list_in_pieces(place: Any, rows: Any, indent: int | None, bom: bool, space: str) -> None:
    data = ("\ufeff" * bom + space + json.dumps(rows, ensure_ascii=False, indent=indent) + space).encode()
    folder = place()
    output = cut_into(folder / "out", data, ".json")
    assert rows_of(output) == [(f"row {number}", row) for number, row in enumerate(rows, 1)]


@FEW
@given(
    table=st.lists(st.lists(texts, min_size=2, max_size=2), min_size=1, max_size=12),
    ending=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_csv_in_pieces(place: Any, table: list[list[str]], ending: str, bom: bool) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=ending)
    writer.writerows([["a", 'b "x"'], *table])
    data = ("\ufeff" * bom + text.getvalue()).encode()
    folder = place()
    output = cut_into(folder / "out", data, ".csv")
    assert rows_of(output) == rows_whole(folder, data, ".csv")


@FEW
@given(rows=rows, first=st.integers(1, 5), kind=st.sampled_from(["lines", "list", "arrow"]))
def test_only_the_first_rows(place: Any, rows: Any, first: int, kind: str) -> None:
    folder = place()
    if kind == "arrow":
        table = pa.table({"n": list(range(len(rows)))})
        (folder / "out").mkdir()
        pieces = Pieces(folder / "out", {}, "a", left=first)
        assert cut_batches(table.to_batches(max_chunksize=2), pieces) == min(first, len(rows))
        found = [row["n"] for _, row in rows_of(folder / "out")]
        assert found == list(range(len(rows)))[:first]
        return
    data = json.dumps(rows) if kind == "list" else "\n".join("\n" + json.dumps(row) for row in rows)
    output = cut_into(folder / "out", data.encode(), ".json" if kind == "list" else ".jsonl", first)
    assert [row for _, row in rows_of(output)] == rows[:first]


def test_only_the_first_records_of_csv(tmp_path: Path) -> None:
    data = b"a,b\n" + b"\n".join(b'%d,"x\ny"\n' % n for n in range(30))
    assert [row["a"] for _, row in rows_of(cut_into(tmp_path / "out", data, ".csv", 7))] == [str(n) for n in range(7)]


def test_csv_that_begins_with_blank_lines(tmp_path: Path) -> None:
    output = cut_into(tmp_path / "out", b"\r\n\na,b\r\n" + b"".join(b"%d,x\r\n" % n for n in range(30)), ".csv")
    assert [place for place, _ in rows_of(output)] == [f"line {n}" for n in range(4, 34)]
    assert [row for _, row in rows_of(output)] == [{"a": str(n), "b": "x"} for n in range(30)]


@pytest.mark.parametrize("end", ["", " ", "\n", "\n\n"])
@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("first", [4, 5, 6, 10, 11, 99])
def test_the_first_rows_of_several_files_however_these_end(
    home: Path, tmp_path: Path, end: str, archive: bool, first: int
) -> None:
    all_rows = [{"n": n} for n in range(15)]
    for number in range(3):
        lines = [json.dumps(row) for row in all_rows[number * 5 :][:5]]
        (home / f"{number}.jsonl").write_text("\n".join(lines) + end)
    with tarfile.open(home / "a.tar", "w") as tar:
        for number in range(3):
            tar.add(home / f"{number}.jsonl", f"{number}.jsonl")
    [part] = shards({"files": "a.tar" if archive else "*.jsonl", "first": first})
    assert [row for _, row in rows_of(bring(part, tmp_path / "out"))] == all_rows[:first]


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    output = cut_into(tmp_path / "out", b'  {"a": 1}\n{"a": 2}\n', ".json")
    assert [path.name for path in sorted(output.glob("*/rows.*"))] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[1, 2", "row 2|after row"),
        (b"[{}, nope, {}" + b" " * 99 + b"]", "a.json, row 2: is not JSON"),
        (b'[{}, {"a": ' + b"9" * 5000 + b"}]", r"a.json, row 2: is not JSON: Exceeds the limit .* has 5000 digits$"),
        (b"[{} {}]", "a.json, after row 1: is not JSON: expected a comma"),
        (b"[{}] x", "there is more after the end of the list"),
        (b'[{"a": "\xff"}]', "a.json, near row 1: is not UTF-8"),
        (b"[" * 100_000, "a.json, row 1: is not JSON: maximum recursion"),
        (b'[{"a": "never ends' + b"x" * 200, "a.json, row 1: is not JSON: Unterminated string"),
    ],
)
def test_a_list_that_is_none(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        cut_into(tmp_path / "out", data, ".json")


def test_csv_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.csv, line 3: is not CSV"):
        cut_into(tmp_path / "out", b'a,b\n1,2\n"x"y,3\n', ".csv")


class TestBatches:
    def table(self) -> pa.Table:
        texts = [f"row {n} " + "x" * (n % 50) for n in range(5000)]
        return pa.table(
            {"text": texts, "kind": pa.array(texts).dictionary_encode(), "nested": [[{"n": n}] for n in range(5000)]}
        ).replace_schema_metadata({"huggingface": "{}"})

    def write(self, path: Path, kind: str) -> Path:
        table = self.table()
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=700)
        else:
            make = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
            with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=700)
        return path

    @pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
    def test_rows_stay_as_they_are(
        self, home: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(batches_module, "PIECE", 100_000)
        name = "a.parquet" if kind == "parquet" else "a.arrow"
        self.write(home / name, kind)
        [part] = shards({"files": name})
        output = bring(part, tmp_path / "out")
        assert rows_of(output) == [(f"row {n}", row) for n, row in enumerate(self.table().to_pylist(), 1)]
        pieces = sorted(output.glob("*/rows.arrow"))
        assert len(pieces) > 2
        with pa.memory_map(str(pieces[0])) as source:
            file = pa.ipc.open_file(source)
            assert file.schema.metadata is None and file.schema.field("kind").type == pa.string()
            assert max(file.get_batch(n).num_rows for n in range(file.num_record_batches)) <= 1024

    @pytest.mark.parametrize(
        ("name", "damage"),
        # Nothing in an Arrow file tells other bytes in its texts.
        [
            (n, d)
            for n in ("a.parquet", "a.arrow")
            for d in ("cut", "other", "turned")
            if (n, d) != ("a.arrow", "turned")
        ],
    )
    def test_what_is_damaged_is_told(self, home: Path, tmp_path: Path, name: str, damage: str) -> None:
        data = bytearray(self.write(tmp_path / "good", name[2:]).read_bytes())
        data[len(data) // 3 : len(data) // 3 + 2000] = bytes(2000) if damage == "turned" else data[:2000]
        (home / name).write_bytes({"cut": data[: len(data) // 2], "other": b"x" * 500, "turned": data}[damage])
        [part] = shards({"files": name})
        with pytest.raises(UserError, match=rf"{name} is not {name[2:].capitalize()}, or damaged"):
            bring(part, tmp_path / "out")

    def test_dictionaries_within_other_columns_may_change_between_batches(self, home: Path, tmp_path: Path) -> None:
        def batch(*roles: str) -> pa.RecordBatch:
            coded = pa.array(roles).dictionary_encode()
            turns = pa.StructArray.from_arrays([coded, pa.array(["x"] * len(roles))], names=["role", "content"])
            lists = {
                "turns": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), turns),
                "large": pa.LargeListArray.from_arrays(pa.array([0, 1, 2], pa.int64()), coded),
                "fixed": pa.FixedSizeListArray.from_arrays(coded, 1),
                "map": pa.MapArray.from_arrays(pa.array([0, 1, 2], pa.int32()), pa.array(["k"] * 2), coded),
            }
            return pa.RecordBatch.from_pydict(lists)

        given = [batch("user", "assistant"), batch("system", "user")]
        with pa.OSFile(str(home / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, given[0].schema) as writer:
            for one in given:
                writer.write_batch(one)
        [part] = shards({"files": "a.arrow"})
        output = bring(part, tmp_path / "out")
        assert [row for _, row in rows_of(output)] == [
            row for one in given for row in one.to_pylist(maps_as_pydicts="strict")
        ]
        for piece in output.glob("*/rows.arrow"):
            with pa.memory_map(str(piece)) as source:
                assert "dictionary" not in str(pa.ipc.open_file(source).schema)

    def one_batch(self, path: Path, **columns: Any) -> Path:
        """An Arrow file of a single batch, as `pyarrow` writes a table and `datasets` a shard."""
        table = pa.table(columns)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return path

    def test_a_batch_as_large_as_its_file_is_never_in_memory(self, home: Path, tmp_path: Path) -> None:
        same = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array(["y" * (1 << 20)]))
        self.one_batch(home / "a.arrow", text=["x" * 200_000] * 256, system=same)  # 49 MiB, and 256 more written out
        [part] = shards({"files": "a.arrow"})
        whole, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            output = bring(part, tmp_path / "out")
            peak = pool.max_memory() + tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(whole)
        assert peak < 45 << 20
        assert [len(row["system"]) for _, row in rows_of(output)] == [1 << 20] * 256

    def test_a_dictionary_that_is_more_than_arrow_can_count_once_written_out(self, tmp_path: Path) -> None:
        values = pa.array([b"z" * (40 << 20)])
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
            coded = pa.DictionaryArray.from_arrays(pa.array([0] * 60, pa.int8()), values)
            with pa.ipc.new_file(sink, pa.schema({"a": coded.type})) as writer:
                writer.write_batch(pa.record_batch({"a": coded}))
        (tmp_path / "out").mkdir()
        with (tmp_path / "a.arrow").open("rb") as file:
            pieces = Pieces(tmp_path / "out", {}, "a", left=3)
            assert cut_batches(batches(file, ".arrow", pieces), pieces) == 3

    @pytest.mark.parametrize("values", [["a", "b" * 50], [b"a", b"b" * 50]])
    def test_a_dictionary_of_views(self, home: Path, tmp_path: Path, values: Any) -> None:
        kind = pa.string_view() if isinstance(values[0], str) else pa.binary_view()
        coded = pa.DictionaryArray.from_arrays(pa.array([1, None, 0], pa.uint32()), pa.array(values, kind))
        self.one_batch(home / "a.arrow", text=coded)
        [part] = shards({"files": "a.arrow"})
        found = rows_of(bring(part, tmp_path / "out"))
        assert [row["text"] for _, row in found] == [values[1], None, values[0]]

    def test_lists_in_one_large_batch_are_written_out_a_slice_at_a_time(self, tmp_path: Path) -> None:
        """Of a slice of lists, Arrow casts what the whole batch holds: 200 slices took 200 times as long."""
        roles = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 100_000, pa.int8()), pa.array(["user", "assistant"]))
        lists = pa.ListArray.from_arrays(pa.array(range(0, 200_001, 2), pa.int32()), roles)
        (tmp_path / "out").mkdir()
        pool, whole = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
        pa.set_memory_pool(pool)
        try:
            cut_batches([pa.record_batch({"roles": lists})], Pieces(tmp_path / "out", {}, "a"))
        finally:
            pa.set_memory_pool(whole)
        assert pool.max_memory() < lists.nbytes

    def test_what_arrow_cannot_write_out_is_told(self, tmp_path: Path) -> None:
        def batch(*words: str) -> pa.RecordBatch:
            coded = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array([[word] for word in words]))
            return pa.record_batch({"a": pa.StructArray.from_arrays([coded], names=["b"])})

        (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match=r"^a\.arrow, row 3 or a later one: Arrow cannot write it out: "):
            cut_batches([batch("a", "b"), batch("c", "d")], Pieces(tmp_path / "out", {}, "a.arrow"))

    def test_a_new_schema_begins_a_new_piece(self, tmp_path: Path) -> None:
        tables = [pa.table({"a": [1, 2]}), pa.table({"a": ["x"]}), pa.table({"b": [1.5]})]
        output = tmp_path / "out"
        output.mkdir()
        cut_batches((batch for table in tables for batch in table.to_batches()), Pieces(output, {}, "a"))
        assert [row for _, row in rows_of(output)] == [{"a": 1}, {"a": 2}, {"a": "x"}, {"b": 1.5}]
        assert [first for first, _ in pieces_of(output)] == [1, 3, 4]

    def test_a_huge_row_group_is_read_in_small_batches(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": ["x" * 1000] * 20_000}), tmp_path / "a.parquet", row_group_size=20_000)
        with (tmp_path / "a.parquet").open("rb") as file:
            sizes = [batch.num_rows for batch in batches(file, ".parquet", Pieces(tmp_path, {}, "a"))]
        assert max(sizes) <= 1024 and sum(sizes) == 20_000


PEAK = """
import resource, sys
from pathlib import Path
from stages import fetch
from stages.stage import Work
found = {{"suffix": ".jsonl", "size": {size}, "sha256": {sha256!r}}}
part = fetch.FetchPart(kind="file", found=found, source="mine", split="train")
out = Path({out!r}); out.mkdir()
fetch.run(part, {{}}, out, Work(out, where={{"name": "a.jsonl", "path": {path!r}}}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_stays_flat(home: Path, tmp_path: Path) -> None:
    line = b'{"text": "' + b"x" * 10_000 + b'"}\n'
    peaks = []
    for count in (1_000, 12_000):  # 10 and 120 MB
        with (home / "a.jsonl").open("wb") as file:
            for _ in range(count):
                file.write(line)
        [part] = shards({"files": "a.jsonl"})
        found = part.config["found"]
        script = PEAK.format(
            size=found["size"], sha256=found["sha256"], out=str(tmp_path / str(count)), path=part.where["path"]
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 24, peaks
