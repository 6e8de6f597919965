"""Recipe YAML: lines are remembered, anchors work, bombs and doubled keys do not."""

import pytest

from flows.strict_yaml import parse
from stages.errors import UserError


def test_every_value_knows_its_line() -> None:
    document = parse("a: 1\nb:\n  c:\n    - x\n    - y\n", "r.yaml")
    assert document.value == {"a": 1, "b": {"c": ["x", "y"]}}
    assert document.line(("b", "c")) == 3
    assert document.line(("b", "c", 1)) == 5
    assert document.line(("b", "nowhere", "at", "all")) == 2


def test_anchors_and_merges_work() -> None:
    document = parse("base: &b {x: 1, y: 2}\nmine:\n  <<: *b\n  y: 3\n", "r.yaml")
    assert document.value["mine"] == {"x": 1, "y": 3}
    assert document.line(("mine", "y")) == 4


def test_a_doubled_key_is_refused_with_its_line() -> None:
    with pytest.raises(UserError, match=r"r\.yaml:3: the key `a` stands here twice"):
        parse("a: 1\nb: 2\na: 3\n", "r.yaml")


def test_a_bomb_is_refused_quickly() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    with pytest.raises(UserError, match="unfold to more than"):
        parse("\n".join(levels), "r.yaml")


def test_an_anchor_inside_itself_is_refused() -> None:
    with pytest.raises(UserError, match="contains itself"):
        parse("a: &a [1, *a]\n", "r.yaml")


@pytest.mark.parametrize("text", ["a: [1, 2", "a: !!python/object:os.system x", "a: b: c", "\ta: 1", "a: 'x"])
def test_what_is_not_yaml_names_its_line(text: str) -> None:
    with pytest.raises(UserError, match=r"r\.yaml:\d+: not valid YAML"):
        parse(text, "r.yaml")


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(UserError):
        parse("[" * 2000 + "]" * 2000, "r.yaml")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("2026-13-45", r"r\.yaml:2: 2026-13-45 is no value: month must be in 1\.\.12; write text between quotes"),
        ('"\\ud800"', r"r\.yaml:2: half of a character"),
    ],
)
def test_what_no_value_can_be_names_its_line(value: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(f"a: 1\nb: {value}\n", "r.yaml")
    with pytest.raises(UserError, match=says):
        parse(f"a: 1\n{value}: b\n", "r.yaml")
