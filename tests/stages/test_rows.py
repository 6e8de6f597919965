"""Rows as convert and evaluate read them, out of columns that Python's types cannot hold or a row cannot name."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.errors import UserError
from stages.formats import BadRow
from stages.rows import read_rows

FAR = 253402300800000
"""The first millisecond of the year 10000."""


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


def texts(*values: bytes) -> pa.Array:
    """A column of text as it stands in a file, without a look at whether it is any."""
    return pa.array(values, pa.binary()).view(pa.string())


@pytest.fixture(params=[".parquet", ".arrow"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"rows{request.param}"


READ = """
import json, sys
from pathlib import Path
from stages.child import _Without
sys.meta_path.insert(0, _Without(("pandas",)))  # as convert's process does
from stages.rows import read_rows
print(json.dumps([row for _, row in read_rows(Path(sys.argv[1]), "f")], default=repr))
"""


def test_nanoseconds_are_text_and_what_has_none_stays_a_time(file: Path) -> None:
    nanoseconds = 1_700_000_000_123_456_789
    inner = pa.struct({"at": pa.timestamp("ns"), "n": pa.int8()})
    columns = {
        "at": pa.array([nanoseconds, None], pa.timestamp("ns")),
        "zoned": pa.array([nanoseconds, None], pa.timestamp("ns", tz="America/New_York")),
        "clock": pa.array([1_001, None], pa.time64("ns")),
        "took": pa.array([1_001, None], pa.duration("ns")),
        "inside": pa.array([[{"at": nanoseconds, "n": 1}], []], pa.list_(inner)),
        "coarse": pa.array([nanoseconds - 789, None], pa.timestamp("ns")),
    }
    command = [sys.executable, "-c", READ, str(write(file, pa.table(columns)))]
    first, second = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert first == {
        "at": "2023-11-14 22:13:20.123456789",
        "zoned": "2023-11-14 17:13:20.123456789-0500",
        "clock": "00:00:00.000001001",
        "took": "1001",
        "inside": [{"at": "2023-11-14 22:13:20.123456789", "n": 1}],
        "coarse": "datetime.datetime(2023, 11, 14, 22, 13, 20, 123456)",
    }
    assert second == {**dict.fromkeys(columns), "inside": []}


def test_years_and_time_zones_that_python_does_not_have(file: Path) -> None:
    columns = {
        "far": pa.array([FAR, 0], pa.timestamp("ms")),
        "day": pa.array([FAR // 86_400_000, 0], pa.int32()).view(pa.date32()),
        "zone": pa.array([0, 1_500], pa.timestamp("ms", tz="Mars/Olympus")),
        "near": pa.array([0, 1_500], pa.timestamp("ms", tz="UTC")),
    }
    first, second = [row for _, row in read_rows(write(file, pa.table(columns)), "f")]
    assert isinstance(first, dict) and isinstance(second, dict)
    assert (first["far"], second["far"]) == ("10000-01-01 00:00:00.000", "1970-01-01 00:00:00.000")
    assert (first["day"], second["day"]) == ("10000-01-01", "1970-01-01")
    assert (first["zone"], second["zone"]) == ("1970-01-01 00:00:00.000Z", "1970-01-01 00:00:01.500Z")
    assert first["near"] == datetime(1970, 1, 1, tzinfo=UTC), "a column that Python can hold stays as it is"


def test_a_value_that_cannot_be_read_makes_its_row_alone_a_bad_one(file: Path) -> None:
    far = pa.array([FAR, FAR, FAR], pa.timestamp("ms"))
    table = pa.table({"a": ["x", "y", "z"], "said": texts(b"ab", b"\xff", b"c"), "far": far})
    found = list(read_rows(write(file, table), "f", first=7))
    assert [place for place, _ in found] == ["row 7", "row 8", "row 9"]
    assert [isinstance(row, BadRow) for _, row in found] == [False, True, False]
    assert found[2][1] == {"a": "z", "said": "c", "far": "10000-01-01 00:00:00.000"}
    bad: Any = found[1][1]
    assert bad.reason == "not UTF-8" and str(bad).startswith("said is not UTF-8 text: ")


def test_any_other_value_that_cannot_be_read_is_told_with_its_column(tmp_path: Path) -> None:
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    [(place, bad)] = read_rows(write(tmp_path / "rows.arrow", pa.table({"a": [1], "meta": twice})), "f")
    assert place == "row 1" and isinstance(bad, BadRow) and bad.reason == "unreadable value"
    assert str(bad).startswith("meta holds what cannot be read: ")


def test_two_columns_of_one_name_are_refused(file: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(UserError, match=r"^f has two columns named 'text': expected names that differ; rename"):
        list(read_rows(write(file, table), "f"))


@pytest.mark.parametrize(("before", "ending"), [(0, "\n"), (3000, "\n"), (3000, "\r\n"), (3000, "\r")])
def test_csv_that_is_not_utf8_is_told_by_its_line(tmp_path: Path, before: int, ending: str) -> None:
    """As Excel saves it: the reader is thousands of characters ahead, or has not begun."""
    path = tmp_path / "rows.csv"
    text = ending.join(["text,b", *["hello,1"] * before, "hé,1", "more,2", ""])
    path.write_bytes(text.encode("cp1252"))
    with pytest.raises(UserError, match=rf"^f, line {before + 2 + 10}: is not UTF-8 text: .* in position 1: "):
        list(read_rows(path, "f", first=11))


def test_two_columns_of_one_name_in_a_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label,text\na,1,b\n")
    with pytest.raises(UserError, match=r"^f has two columns named 'text': expected names that differ"):
        list(read_rows(path, "f"))
    path.write_text("text,,\na,,\n")
    assert [row for _, row in read_rows(path, "f")] == [{"text": "a", "": ""}], "a spreadsheet's empty columns"


NAN = float("nan")


def test_nan_is_null_in_text(tmp_path: Path) -> None:
    """As `json.dumps(frame.to_dict("records"))` writes an empty cell."""
    row = {"input": NAN, "n": 1.5, "said": [{"role": "user", "weight": NAN}], "far": float("inf"), "name": "NaN"}
    read = {**row, "input": None, "said": [{"role": "user", "weight": None}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    for path in tmp_path.iterdir():
        assert [row for _, row in read_rows(path, "f")] == [read]


def test_nan_is_null_in_columns(file: Path) -> None:
    said = [[{"role": "user", "weight": NAN}, {"role": "assistant", "weight": 1.0}]]
    half = pa.array([None, NAN], pa.float16())
    table = pa.table({"n": [NAN, 1.5], "half": half, "said": [said[0], None], "vector": [[0.5], []]})
    assert [row for _, row in read_rows(write(file, table), "f")] == [
        {"n": None, "half": None, "said": [{"role": "user"}, {"role": "assistant", "weight": 1.0}], "vector": [0.5]},
        {"n": 1.5, "half": None, "said": None, "vector": []},
    ]


def test_a_map_is_an_object(file: Path) -> None:
    """Spark's `MapType`."""
    kind = pa.map_(pa.string(), pa.string())
    said = pa.array([[[("role", "user"), ("content", "q")]], None, []], pa.list_(kind))
    meta = pa.array([[("lang", "en")], None, [("a", "b"), ("a", "c")]], kind)
    rows = [row for _, row in read_rows(write(file, pa.table({"said": said, "meta": meta})), "f")]
    assert rows[:2] == [{"said": [{"role": "user", "content": "q"}], "meta": {"lang": "en"}}, dict.fromkeys(rows[0])]
    assert isinstance(rows[2], BadRow) and str(rows[2]).startswith("meta holds what cannot be read: ")


def test_a_number_of_too_many_digits_is_a_bad_row(tmp_path: Path) -> None:
    row = f'{{"x": {"9" * 5000}}}'
    (tmp_path / "rows.jsonl").write_text(f'{row}\n{{"x": 1}}\n')
    [(_, bad), (_, good)] = read_rows(tmp_path / "rows.jsonl", "f")
    assert isinstance(bad, BadRow) and bad.reason == "not JSON" and "4300 digits" in str(bad) and good == {"x": 1}
    (tmp_path / "rows.json").write_text(f"[{row}]")
    with pytest.raises(UserError, match=r"^f is not JSON: .*4300 digits"):
        list(read_rows(tmp_path / "rows.json", "f"))
