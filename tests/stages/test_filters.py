"""The language of `convert.filter`: what it says, what it refuses, and that it agrees with Python where both speak."""

import json
import sys
import time
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages import convert, filters
from stages.errors import UserError
from stages.filters import WrongType, parse
from stages.formats import BadRow
from tests.stages.chats import rows_of, run_convert, smollm2, source

ROW = {
    "lang": "en",
    "score": 0.9,
    "n": 3,
    "ok": True,
    "none": None,
    "odd name": "x",
    "tags": ["math", 'say "hi"'],
    "meta": {"lang": "DE", "deep": {"n": [1, [2]]}},
    "messages": [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "http://c"}],
}


@pytest.mark.parametrize(
    "text",
    [
        'lang == "en"',
        "lang == 'en' and score >= 0.8",
        "not (lang == 'de') and not ok == false",
        "ok",
        "ok or missing == 1",
        "not not ok",
        "n == 3.0 and n != 3.5 and n > -1 and n < 1e3 and n <= 3 and n >= 3",
        "ok != 1 and ok == true and none == null and none != false",
        'lang in ["de", "en"] and lang not in ["fr"] and lang not in []',
        '"math" in tags and not "art" in tags and "art" not in tags',
        'lang in ["en"]',
        "'e' in lang and 'lang' in meta",
        '\'say "hi"\' in tags and "say \\"hi\\"" in tags',
        "messages[-1].role == 'assistant' and messages[0].content == 'a\\nb'",
        "len(messages) > 1 and len(lang) == 2 and len(meta) == 2 and len([]) == 0",
        "lower(meta.lang) == 'de' and startswith(messages[1].content, 'http') and endswith(lang, 'n')",
        '`odd name` == "x" and has(`odd name`) and meta["lang"] == "DE" and meta.`lang` == "DE"',
        "has(none) and has(meta.deep.n[1][0]) and not has(meta.none) and not has(messages[2]) and not has(lang.x)",
        "meta.deep.n[1][0] == 2 and meta.deep.n == [1, [2]] and tags != ['math']",
        "lang == 'de' or lang == 'fr' or lang == 'en'",
        "ok and (lang == 'de' or n == 3)",
        "lang < 'fr' and 'B' < 'a'",
    ],
)
def test_what_holds(text: str) -> None:
    assert parse(text)(ROW) is True
    assert parse(f"not ({text})")(ROW) is False


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lang = 'en'", "sign 6: '=' means nothing here; equality is =="),
        ("a && b", "sign 3: '&' means nothing here; write `and`"),
        ("!a", "sign 1: '!' means nothing here; write `not`"),
        ("a == 'x", 'sign 6: "\'" means nothing here; is a quote missing?'),
        ("odd-name == 1", r"sign 4: .-. means nothing here; a name with such signs stands between backquotes"),
        ("", "sign 1: expected a field, a value or `\\(`, found the end"),
        ("a ==", "sign 5: expected a field, a value or `\\(`, found the end"),
        ("(a == 1", "sign 8: expected `\\)`, found the end"),
        ("a == 1 b", "sign 8: expected `and`, `or` or the end, found `b`"),
        ("1 < n < 3", "sign 7: one comparison at a time: join two of them with `and`, found `<`"),
        ("a not b", "sign 7: expected `in`, found `b`"),
        ("a.1", "sign 3: expected a field's name"),
        ("a[b]", "sign 3: expected a whole number or a name in quotes, found `b`"),
        ("a[1.5]", "expected a whole number"),
        ("open('x')", "sign 1: there is no function open: known are len, lower"),
        ("a.b('x')", "sign 4: expected `and`, `or` or the end, found `\\(`"),
        ("len(a, b) == 1", "sign 1: len takes 1 values, not 2"),
        ("has(len(a))", "has asks for a field"),
        ("and", "expected a field, a value"),
        ("in == 1", "expected a field, a value"),
        ("n == 1e999", "1e999 is too large"),
        ("a == " + "x" * 2000, "at most 2000 signs"),
        ("(" * 40 + "a" + ")" * 40, "more than 32 brackets"),
        ("not " * 40 + "a", "more than 32 brackets"),
        ("a == " + "[" * 40, "more than 32 brackets"),
    ],
)
def test_what_is_no_expression_is_told_with_its_place(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("score > 'x'", "cannot compare a number with text"),
        ("none < 1", "cannot compare null with a number"),
        ("ok < 2", "cannot compare true or false with a number"),
        ("scroe > 1", r"scroe is not in the row: ask with `has\(scroe\) and ...`"),
        ("meta.x.y == 1", "meta.x.y is not in the row"),
        ("messages[9].role == 1", r"messages\[9\]\.role is not in the row"),
        ("lang", "`lang`|lang is text: expected true or false"),
        ("not n", "what stands behind `not` is a number"),
        ("ok and lang", "what stands beside `and` is text"),
        ("1 in lang", "cannot look for a number in text"),
        ("'x' in n", "cannot look for text in a number"),
        ("len(n) == 1", "len of a number"),
        ("lower(none) == ''", "lower of null: expected text"),
        ("startswith(lang, 1)", "startswith of a number"),
    ],
)
def test_a_row_that_it_does_not_apply_to_is_neither_kept_nor_dropped(text: str, says: str) -> None:
    with pytest.raises(WrongType, match=says):
        parse(text)(ROW)


def test_numbers_that_are_none_are_never_in_order() -> None:
    row = {"n": json.loads("NaN")}
    assert not any(parse(f"n {sign} 1")(row) for sign in ("<", "<=", ">", ">=", "=="))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("day == '2024-05-01'", "cannot compare a date with text: expected two values of one kind"),
        ("day != '2024-05-01'", "cannot compare a date with text"),
        ("'2024-05-01' == day", "cannot compare text with a date"),
        ("day in ['2024-05-01']", "cannot compare a date with text"),
        ("days == ['2024-05-01']", "cannot compare a date with text"),
        ("price == 1.5", "cannot compare a Decimal with a number"),
        ("raw not in ['a']", "cannot compare a bytes with text"),
        ("day == moment", "cannot compare a date with a datetime"),
    ],
)
def test_what_json_does_not_have_never_differs_in_silence(text: str, says: str) -> None:
    day = date(2024, 5, 1)
    row = {"day": day, "days": [day], "moment": datetime(2024, 5, 1), "price": Decimal("1.5"), "raw": b"a"}
    with pytest.raises(WrongType, match=says):
        parse(text)(row)
    assert parse("day == days[0] and day in days and price != null and not raw == null and day in [null, day]")(row)


# The oracle: expressions as trees, said in the language and computed by a few lines of Python.
values = st.one_of(st.integers(-9, 9), st.booleans(), st.none(), st.text("ab\"'\\\n", max_size=3), st.floats(-9, 9))
rows = st.fixed_dictionaries({"a": values, "b": values, "c": st.lists(values, max_size=3)})
atoms = st.one_of(values.map(lambda value: ("value", value)), st.sampled_from("abc").map(lambda name: ("field", name)))
tests = st.tuples(st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "in", "not in"]), atoms, atoms)
trees = st.recursive(
    tests,
    lambda inner: st.one_of(st.tuples(st.just("not"), inner), st.tuples(st.sampled_from(["and", "or"]), inner, inner)),
    max_leaves=8,
)


def said(tree: Any) -> str:
    if tree[0] == "value":
        value = tree[1]
        return (
            {True: "true", False: "false", None: "null"}[value]
            if value is None or value is True or value is False
            else (
                '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
                if isinstance(value, str)
                else repr(value)
            )
        )
    if tree[0] == "field":
        return str(tree[1])
    if tree[0] == "not":
        return f"not ({said(tree[1])})"
    return f"({said(tree[1])}) {tree[0]} ({said(tree[2])})"


def plain(value: Any) -> Any:
    """A value that Python compares as JSON does: numbers apart from true and false."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return ("number", value) if isinstance(value, int | float) and not isinstance(value, bool) else (type(value), value)


def computed(tree: Any, row: Any) -> Any:
    sign = tree[0]
    if sign == "value":
        return tree[1]
    if sign == "field":
        return row[tree[1]]
    if sign == "not":
        return not computed(tree[1], row)
    if sign == "and":
        return computed(tree[1], row) and computed(tree[2], row)
    if sign == "or":
        return computed(tree[1], row) or computed(tree[2], row)
    left, right = computed(tree[1], row), computed(tree[2], row)
    if sign in ("==", "!="):
        return (plain(left) == plain(right)) == (sign == "==")
    if sign in ("in", "not in"):
        if isinstance(right, list):
            return any(plain(left) == plain(one) for one in right) == (sign == "in")
        if isinstance(left, str) and isinstance(right, str):
            return (left in right) == (sign == "in")
        raise TypeError
    number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (left, right))
    if not number and not (isinstance(left, str) and isinstance(right, str)):
        raise TypeError
    return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[sign]


@settings(max_examples=400, deadline=None)
@given(tree=trees, row=rows)
def test_it_says_what_python_says(tree: Any, row: Any) -> None:
    keep = parse(said(tree))
    try:
        expected = computed(tree, row)
    except TypeError:
        with pytest.raises(WrongType):
            keep(row)
        return
    assert keep(row) is expected


@settings(max_examples=400, deadline=None)
@given(text=st.lists(st.sampled_from([*"ab1 .,()[]<>=!\"'`\\-nότ\u2028\0", "and ", "not ", "in "])).map("".join))
def test_any_text_is_an_expression_or_refused_with_a_place(text: str) -> None:
    try:
        keep = parse(text)
    except ValueError as error:
        assert f"filter `{text}`, sign " in str(error)
        return
    with suppress(WrongType):
        assert keep({"a": 1, "b": "b"}) in (True, False)


def test_the_longest_expression_over_a_long_row_is_quick() -> None:
    text = " or ".join(["'zz' in a"] * 150)
    assert len(text) <= filters.LONGEST
    row = {"a": "z" + "y" * 1_000_000}
    keep = parse(text)
    started = time.process_time()
    assert keep(row) is False
    assert time.process_time() - started < 5.0


class TestConvert:
    """`convert.filter` at work."""

    ROWS: ClassVar[list[dict[str, Any]]] = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}], "n": number}
        for number, text in enumerate("bcde")
    ]

    def convert(self, tmp_path: Path, rows: Any, **config: Any) -> tuple[Path, Any]:
        return run_convert(tmp_path / "out", source(tmp_path / "rows", rows), smollm2(), config)

    def test_rows_keep_their_numbers_and_are_counted(self, tmp_path: Path) -> None:
        output, facts = self.convert(tmp_path, self.ROWS, filter="n in [1, 3]")
        assert [row["row"] for row in rows_of(output)] == [1, 3]
        assert facts["rows"] == 4 and facts["dropped"] == {"filtered": 2}

    def test_the_format_is_recognised_from_the_rows_that_are_kept(self, tmp_path: Path) -> None:
        others = [{"instruction": "x", "output": "y"}] * 3
        output, facts = self.convert(tmp_path, [*others, *self.ROWS], filter="has(messages)")
        assert facts["formats"] == {"messages": 1} and len(rows_of(output)) == 4
        assert facts["dropped"] == {"filtered": 3}

    def test_a_shard_of_which_nothing_is_kept(self, tmp_path: Path) -> None:
        output, facts = self.convert(tmp_path, self.ROWS, filter="n > 9")
        assert rows_of(output) == [] and facts["dropped"] == {"filtered": 4}

    def test_rows_that_it_does_not_apply_to_go_by_the_policy(self, tmp_path: Path) -> None:
        rows = [*self.ROWS, {"messages": self.ROWS[0]["messages"]}]
        says = r"mine\.jsonl, line 5: the filter does not apply: n is not in the row: ask with `has\(n\) and \.\.\.`"
        with pytest.raises(UserError, match=says):
            self.convert(tmp_path / "error", rows, filter="n > 1")
        _, facts = self.convert(tmp_path / "drop", rows, filter="n > 1", bad_rows="drop")
        assert facts["dropped"] == {"filtered": 2, "filter does not apply": 1}

    def test_it_is_refused_with_the_recipe_and_set_for_single_sources(self) -> None:
        with pytest.raises(ValidationError, match="sign 3: '=' means nothing here; equality is =="):
            convert.ConvertConfig.model_validate({"filter": "n = 1"})
        config = convert.ConvertConfig.model_validate({"filter": "n == 1", "sources": {"a": {"filter": "n == 2"}}})
        assert (config.of("a").filter, config.of("b").filter) == ("n == 2", "n == 1")


def test_rows_too_deep_to_compare_are_bad_ones() -> None:
    deep: Any = []
    for _ in range(sys.getrecursionlimit()):
        deep = [deep]
    row = {"x": deep, "y": [deep[0]]}
    [(_, bad)] = filters.filtered(iter([("line 1", row)]), "x == y")
    assert isinstance(bad, BadRow) and "the filter does not apply: maximum recursion depth" in str(bad)
