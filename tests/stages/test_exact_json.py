"""Fast JSON gives what Python's own gives, whatever stands in it."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import exact_json

NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**30])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)

ODD = [
    "18446744073709551616", "[18446744073709551616.0]", "1E400", "-0", "-0.0", "1" * 400, "0.1e-400", "NaN",
    "-Infinity", '{"a": 1, "a": 2}', '"\\ud800"', "1.0000000000000000000000001", "[" * 900 + "]" * 900,
    " 1 ", '"\u2028"',
]  # fmt: skip
WRONG = ["[" * 1010 + "]" * 1010, "", "[1,]", "01", "1.", "-", "[]x", '"\x01"', "{'a': 1}", "nul", "[" * 100_000]


def same(left: object, right: object) -> bool:
    """Equal, of the same types all through, and NaN equal to itself."""
    return repr(left) == repr(right)


@given(VALUES, st.booleans())
def test_what_json_reads(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert same(exact_json.loads(text), json.loads(text))
    data = text.encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(data)
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            exact_json.loads(data)
    else:
        assert same(exact_json.loads(data), expected)


@pytest.mark.parametrize("text", ODD)
def test_what_is_odd(text: str) -> None:
    assert same(exact_json.loads(text.encode()), json.loads(text))


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong(text: str) -> None:
    with pytest.raises((json.JSONDecodeError, RecursionError)) as expected:
        json.loads(text)
    with pytest.raises(type(expected.value)) as found:
        exact_json.loads(text)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_what_is_not_plain_utf_8(encoding: str) -> None:
    assert exact_json.loads('{"a": "é"}'.encode(encoding)) == {"a": "é"}


@given(VALUES)
def test_what_is_written_reads_back(value: object) -> None:
    text = exact_json.dumps(value)
    if all(math.isfinite(number) for number in floats(value)):
        assert same(exact_json.loads(text), json.loads(json.dumps(value)))


def floats(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in floats(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in floats(inner)]
    return [value] if isinstance(value, float) else []
