"""`docs/reliability.md` says what the tests show, no more and no less."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests import reliability


def test_the_page_has_every_row_that_a_test_declares() -> None:
    text = reliability.PAGE.read_text()
    assert text == reliability.page({}, text), "write it with `pytest --write-reliability`"
    assert reliability.NOT_HELD not in text, "a failure is on the page that regrow does not stand"


def test_a_row_says_what_its_test_measured_and_keeps_it() -> None:
    first, *_ = rows = reliability.declared()
    assert len(rows) > 10
    page = reliability.page({first.test: "7 s"}, "")
    assert first.line("7 s") in page.splitlines()
    assert reliability.page({}, page) == page
    assert reliability.NOT_HELD in reliability.page({first.test: reliability.NOT_HELD}, page)


def test_what_the_page_says_of_a_failure_goes_once_the_test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    monkeypatch.setattr(reliability, "_SEEN", seen)

    def report(name: str, passed: bool, *measured: tuple[str, float]) -> Any:
        told = {"passed": passed, "failed": not passed, "when": "call", "user_properties": measured}
        return SimpleNamespace(nodeid=f"tests/test_a.py::{name}", **told)

    for each in (
        report("plain", True),
        report("timed", True, ("marked_after", 3.2)),
        report("each[1]", True, ("marked_after", 3.2)),
        report("each[2]", True, ("marked_after", 7.0)),
        report("half[1]", False),
        report("half[2]", True, ("marked_after", 1.0)),
    ):
        reliability.pytest_runtest_logreport(each)
    names = ("plain", "timed", "each", "half")
    assert [seen[f"test_a::{name}"] for name in names] == ["", "3 s", "7 s", reliability.NOT_HELD]
