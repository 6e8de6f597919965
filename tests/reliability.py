"""What each failure leads to: `docs/reliability.md`, written from the tests that bring the failures about.

A test declares its row with `@pytest.mark.failure(what=..., outcome=...)`; a test of a real server also tells with
`record_property("marked_after", seconds)` how long it took until the run was marked as what it is. `pytest
--write-reliability` writes the page from the rows and from what this session saw; rows whose test did not run keep
what the page says. The page never shows a row whose test failed in this session as held.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"

HEAD = """\
# When something dies

Each row is a failure that a test really causes: with real processes, a real Prefect server and a real S3 server
(SeaweedFS). If a whole run is hit (`test_failures`, `test_failures_of_the_store`), the test then checks that no process
is left over, no lock is held beyond its lease, the store is intact (`regrow verify --deep`), the run is marked as what
it is within 120 s, and the next run resumes it. The third column is the measured time from the failure to that mark, on
two busy cores.

Tests in *italics* take long and run with `make test-full`, which writes this page; the others run with every
`make test`.

| what fails | what happens then | marked after | shown by |
| --- | --- | --- | --- |
"""

NOT_HELD = "FAILED"


@dataclass(frozen=True)
class Row:
    """One declared failure."""

    what: str
    outcome: str
    test: str
    full: bool

    def line(self, marked: str) -> str:
        name = f"*{self.test}*" if self.full else self.test
        return f"| {self.what} | {self.outcome} | {marked} | {name} |"


def declared() -> list[Row]:
    """The rows that the tests declare, in the order of files and lines."""
    return [row for path in sorted((ROOT / "tests").rglob("test_*.py")) for row in _rows(path)]


def written(page: str) -> dict[str, str]:
    """What a page says about when runs were marked, by test."""
    rows = re.findall(r"^\| .* \| .* \| (.*) \| \*?([^|*]+)\*? \|$", page, re.M)
    return {test: marked for marked, test in rows}


def page(seen: dict[str, str], before: str) -> str:
    """The page: what this session has seen, by test, over what the page said before."""
    told = {**written(before), **seen}
    return HEAD + "\n".join(row.line(told.get(row.test, "")) for row in declared()) + "\n"


def _rows(path: Path) -> Iterator[Row]:
    text = path.read_text()
    if "mark.failure(" not in text:
        return
    tree = ast.parse(text)
    all_full = any("pytestmark" in ast.unparse(n) and "mark.full" in ast.unparse(n) for n in tree.body)
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        marks = [ast.unparse(mark) for mark in function.decorator_list]
        for mark in function.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.failure":
                told = {word.arg: ast.literal_eval(word.value) for word in mark.keywords}
                full = all_full or "pytest.mark.full" in marks
                yield Row(told["what"], told["outcome"], f"{path.stem}::{function.name}", full)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-reliability", action="store_true", help="write docs/reliability.md from what was seen")


_SEEN: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called where all reports arrive, also those of xdist's workers."""
    path, _, name = report.nodeid.partition("::")
    test = f"{Path(path).stem}::{name.partition('[')[0]}"
    if report.failed:
        _SEEN[test] = NOT_HELD
    elif report.when == "call" and report.passed:
        _SEEN.setdefault(test, "")  # also where nothing is measured: what the page says of an earlier failure goes
    for key, value in report.user_properties if report.when == "call" else ():
        if key == "marked_after" and _SEEN.get(test) != NOT_HELD:
            _SEEN[test] = f"{max(float(str(value)), float((_SEEN.get(test) or '0').removesuffix(' s'))):.0f} s"


def pytest_sessionfinish(session: Any) -> None:
    if session.config.getoption("--write-reliability") and not hasattr(session.config, "workerinput"):
        PAGE.write_text(page(_SEEN, PAGE.read_text() if PAGE.exists() else ""))
