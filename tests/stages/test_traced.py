"""Traced text: every operation gives the text that a plain string gives, and never loses where a character came from.

The oracle is the alphabet: leaf 0 is written in a, b, c and space, leaf 1 in 1, 2, 3 and line break, the template in
capitals and brackets. So each character of a result says by itself where it must have come from.
"""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from stages import sandbox, traced
from stages.traced import TEMPLATE, Traced, Untraceable, concat, runs_of

ALPHABETS = {0: "abc ", 1: "123\n", TEMPLATE: 'XYZ<>:,"{}[]\\n'}


def leaf(number: int) -> st.SearchStrategy[Traced]:
    return st.text(ALPHABETS[number], max_size=8).map(lambda text: Traced(text, ((len(text), number),)))


mixed = st.lists(st.one_of(leaf(0), leaf(1), st.text("XYZ<>", max_size=3)), max_size=5).map(concat)
separators = st.sampled_from(["a", " ", "ab", "1", "\n", "X", "<>", "b\n"])

ONE: dict[str, Callable[[str], str]] = {
    "strip": lambda s: s.strip(),
    "lstrip": lambda s: s.lstrip(),
    "rstrip": lambda s: s.rstrip("c\n"),
    "slice": lambda s: s[1:-1],
    "tail": lambda s: s[-3:],
    "head": lambda s: s[:2],
    "whole": lambda s: s[:],
    "last": lambda s: s[-1] if s else s,
    "upper and back": lambda s: s.upper().lower() if s.islower() else s,
    "removeprefix": lambda s: s.removeprefix("a"),
    "removesuffix": lambda s: s.removesuffix("3"),
    "words": lambda s: concat(s.split()),
    "last words": lambda s: concat(s.rsplit(None, 1)),
    "lines": lambda s: concat(s.splitlines()),
    "lines with ends": lambda s: concat(s.splitlines(True)),
    "letters": lambda s: concat(list(s)),
    "str": str,
}
TWO: dict[str, Callable[[str, str], str]] = {
    "first": lambda s, by: s.split(by)[0],
    "last": lambda s, by: s.split(by)[-1],
    "all": lambda s, by: concat(s.split(by)),
    "one": lambda s, by: concat(s.split(by, 1)),
    "right": lambda s, by: s.rsplit(by, 1)[0],
    "partition": lambda s, by: s.partition(by)[2],
    "rpartition": lambda s, by: s.rpartition(by)[0],
    "gone": lambda s, by: s.replace(by, ""),
    "gone once": lambda s, by: s.replace(by, "", 1),
    "added": lambda s, by: "X" + s + "Y",
}


def check(found: str, expected: str) -> None:
    assert found == expected and hash(found) == hash(expected)
    runs = runs_of(found)
    assert sum(length for length, _ in runs) == len(found)
    at = 0
    for length, number in runs:
        assert set(expected[at : at + length].lower()) <= set(ALPHABETS[number].lower()), (expected, runs)
        at += length


@given(mixed, st.sampled_from(sorted(ONE)))
def test_operations_keep_text_and_origins(text: str, name: str) -> None:
    check(ONE[name](text), ONE[name](str.__str__(text)[:] + ""))


@given(mixed, separators, st.sampled_from(sorted(TWO)))
def test_operations_with_a_separator(text: str, by: str, name: str) -> None:
    check(TWO[name](text, by), TWO[name]("".join(text), by))


@given(st.lists(mixed, max_size=4), st.sampled_from(["", "X", ","]))
def test_join(parts: list[str], separator: str) -> None:
    check(traced.join(separator, parts), separator.join(parts))


values = st.recursive(
    st.one_of(leaf(0), leaf(1), st.integers(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(leaf(0), inner, max_size=3)),
    max_leaves=6,
)


@given(values, st.sampled_from([None, 2]), st.booleans())
def test_json_has_the_layout_of_the_standard_library(value: object, indent: int | None, sort_keys: bool) -> None:
    found = traced.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)
    assert found == json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)


@given(st.text(max_size=20), st.booleans())
def test_json_escapes_stay_with_their_leaf(text: str, ensure_ascii: bool) -> None:
    marked = Traced(text, ((len(text), 7),))
    found = traced.dumps({"k": [marked, marked]}, ensure_ascii=ensure_ascii)
    assert found == json.dumps({"k": [text, text]}, ensure_ascii=ensure_ascii)
    written = len(json.dumps(text, ensure_ascii=ensure_ascii)) - 2
    assert runs_of(found) == ((8, TEMPLATE), (written, 7), (4, TEMPLATE), (written, 7), (3, TEMPLATE))


def test_an_empty_leaf_keeps_its_place() -> None:
    assert runs_of("X" + Traced("", ((0, 5),)).strip() + "Y") == ((1, TEMPLATE), (0, 5), (1, TEMPLATE))


CONTEXT = {"a": " ab c ", "n": "1\n2", "empty": "", "words": ["ab", "c"], "call": {"b": ["a", 1, None], "a": "c"}}

FOLLOWED = [
    "<{{ a }}>{{ n }}",
    "{{ 'X' + a + 'Y' }}",
    "{{ 'X' ~ a ~ n ~ 'Y' ~ empty }}",
    "{{ a | trim }}{{ a.strip() | upper }}{{ n | string }}",
    "{{ a | replace('b', '') }}{{ a.replace(' ', '') }}",
    "{{ a[1:] }}{{ a[0] }}{{ n.split('\n')[-1] }}",
    "{% for c in a %}<{{ c }}>{% endfor %}",
    "{% set x = a ~ 'X' %}{% set y %}Y{{ x }}{% endset %}{{ y }}",
    "{% macro m(t) %}<{{ t }}>{% endmacro %}{{ m(a) }}{{ m(n) ~ 'Z' }}",
    "{% set ns = namespace(t='X') %}{% for w in words %}{% set ns.t = ns.t + w %}{% endfor %}{{ ns.t }}",
    "{{ words | join(',') }}{{ ','.join(words) }}{{ words | map('upper') | list | join('X') | lower | upper }}",
    "{{ call | tojson }}{{ call | tojson(indent=2) }}{{ call | tojson(sort_keys=true) }}",
    "{% for k, v in call.items() %}{{ k }}:{{ v | tojson if v is not string else v }}{% endfor %}",
    "{{ a if a else 'X' }}{{ empty or n }}{{ missing | default(a) }}{{ a | default('X') }}",
    "{% if 'b' in a and a.startswith(' ') and a | length == 6 %}{{ a }}{% endif %}",
    "{{ words | first }}{{ words | last }}{{ a | first }}{{ (words + [n]) | last }}",
    "{% generation %}{{ a }}{% endgeneration %}X",
    "{% for w in words %}{% if loop.last %}{% break %}{% endif %}{{ w }}{% endfor %}",
    "{{ a | safe }}X{{ 'Y' ~ (n | safe) }}",
    "{{ {'k': a}['k'] }}{{ dict(k=a).k }}{{ [a, n][1] }}",
]


@pytest.mark.parametrize("template", FOLLOWED)
def test_templates_write_what_they_write_in_transformers(template: str) -> None:
    [expected], _ = render_jinja_template(
        [[CONTEXT]], chat_template=f"{{% set a = messages[0].a %}}{_unpacked()}{template}"
    )
    marked = {name: traced.mark(value, _leaf_of) for name, value in CONTEXT.items()}
    found = sandbox.environment().from_string(template).render(**marked)
    assert found == expected
    at = 0
    for length, number in runs_of(found):
        letters = {c for c in expected[at : at + length].lower() if c.isalnum()}
        # `string`, `k`, `null` and `true` are the template's own words in these.
        if number != TEMPLATE:
            assert letters <= set("abc123"), (expected, runs_of(found))
        else:
            assert not letters & set("ab23"), (expected, runs_of(found))
        at += length


def _unpacked() -> str:
    return "".join(f"{{% set {name} = messages[0].{name} %}}" for name in CONTEXT)


def _leaf_of() -> int:
    return 0


LOST = [
    "{{ '%s' % a }}",
    "{{ 'X%s' | format(a) }}",
    "{{ '{}'.format(a) }}",
    "{{ a * 2 }}",
    "{{ a[::2] }}",
    "{{ n | indent }}",
    "{{ a | wordwrap }}",
    "{{ 'X'.replace('X', a) }}",
    "{{ (a | safe) + 'X' }}",
    "{{ a.center(20) }}",
    "{{ a.format(1) }}",
    "{{ 'ß'.join([a]).replace('', 'X') }}",
]


@pytest.mark.parametrize("template", LOST)
def test_what_cannot_be_followed_is_refused(template: str) -> None:
    marked = {name: traced.mark(value, _leaf_of) for name, value in CONTEXT.items()}
    with pytest.raises(Untraceable):
        sandbox.environment().from_string(template).render(**marked)


@pytest.mark.parametrize("template", ["{{ a.__class__ }}", "{{ a._runs }}", "{{ [].append(1) }}", "{{ x.pop() }}"])
def test_the_sandbox_gives_nothing_away(template: str) -> None:
    marked = {"a": traced.mark("ab", _leaf_of), "x": ["a"]}
    environment = sandbox.environment()
    try:
        found = environment.from_string(template).render(**marked)
    except Exception as error:
        assert type(error).__name__ in ("SecurityError", "UndefinedError")
    else:
        assert found == ""


def test_nothing_random_and_no_clock() -> None:
    environment = sandbox.environment()
    assert "random" not in environment.filters and "lipsum" not in environment.globals
    assert "strftime_now" not in environment.globals
