"""The graph and its selectors."""

import pytest

from flows.graph import ORDER, WIRING, downstream, select, upstream
from stages.errors import UserError


def test_wiring_points_forward_only() -> None:
    for stage in ORDER:
        assert all(ORDER.index(above) < ORDER.index(stage) for above in upstream(stage))


def test_every_stage_reaches_publish() -> None:
    for stage in ORDER:
        assert "publish" in select([f"{stage}+"])


@pytest.mark.parametrize(
    ("selectors", "exclude", "expected"),
    [
        ([], [], list(ORDER)),
        (["train"], [], ["train"]),
        (["merge+"], [], ["merge", "evaluate", "publish"]),
        (["+pack"], [], ["fetch", "convert", "tokenize", "pack"]),
        (["pack,train"], [], ["pack", "train"]),
        (["pack train"], [], ["pack", "train"]),
        (["1+pack"], [], ["fetch", "tokenize", "pack"]),
        (["pack+1"], [], ["pack", "train", "evaluate", "publish"]),
        (["train+"], ["publish"], ["train", "merge", "evaluate"]),
        ([], ["evaluate+"], ["fetch", "convert", "tokenize", "pack", "score", "train", "merge"]),
        (["+train+"], [], list(ORDER)),
    ],
)
def test_selectors(selectors: list[str], exclude: list[str], expected: list[str]) -> None:
    assert select(selectors, exclude) == expected


@pytest.mark.parametrize(
    ("selector", "hint"),
    [("tran", "did you mean `train`"), ("++x", "expected STAGE"), ("", "names no stage"), (" , ", "names no stage")],
)
def test_a_wrong_selector_says_what_is_right(selector: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint.replace("+", r"\+")):
        select([selector])


def test_up_and_down_are_inverse() -> None:
    for stage in ORDER:
        assert all(stage in downstream(above) for above in upstream(stage))
        assert len(WIRING[stage]) >= len(upstream(stage))
