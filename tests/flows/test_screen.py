"""What the terminal shows while a stage works: a bar with its rate and the time that is left, in 80 columns."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from flows.screen import Screen, seconds
from stages.build import Built
from stages.identity import Tree
from stages.manifest import Artifact

RUN: Any = None
"""The screen does not look at the run."""


def event(done: int, unit: str = "rows", **metrics: float) -> dict[str, Any]:
    return {"event": "tell", "done": done, "total": 4000, "unit": unit, "metrics": metrics}


def test_a_bar_tells_rate_and_time_left_and_goes() -> None:
    written = io.StringIO()
    screen = Screen(Console(file=written, width=80, force_terminal=True, color_system=None))
    follower = screen.follower()
    follower.started(RUN, "train")
    assert screen.bar is not None
    for told in (event(1000), event(1500, loss=2.5)):
        follower.event(RUN, "train", told)
        screen.bar.progress.refresh()
    (line,) = re.findall(r"train +[^\r\n]*loss 2\.500", written.getvalue())[-1:]
    assert re.search(r" 38% [\d,]+ rows/s  [\d.:]+( s)? left loss 2\.500$", line), line
    assert len(line) <= 78
    follower.event(RUN, "train", event(1, "steps"))
    assert screen.bar.progress.tasks[0].completed == 1, "another kind of work has a rate of its own"
    facts = {"steps": 4, "first_loss": 3.0, "last_loss": 1.0, "tokens_per_second": 1234.0, "resumed_at_step": 0}
    artifact = Artifact({}, "0123456789abcdef", Tree(()), facts, {}, {})
    follower.finished(RUN, "train", Built(artifact, False, 1.0))
    assert screen.bar is None
    assert re.search(
        r"✓ train +[\d.]+ s  01234567  4 steps, loss 3\.000 → 1\.000, 1,234 tokens/s\n$", written.getvalue()
    )


def test_a_pipe_gets_lines_only() -> None:
    written = io.StringIO()
    screen = Screen(Console(file=written, width=80))
    follower = screen.follower()
    follower.started(RUN, "convert")
    follower.event(RUN, "convert", event(1000))
    facts: dict[str, Any] = {"rows": 4000, "dropped": {"not JSON": 3}, "formats": {"messages": 2, "alpaca": 1}}
    artifact = Artifact({}, "0123456789abcdef", Tree(()), facts, {}, {})
    follower.finished(RUN, "convert", Built(artifact, True, 0.0))
    assert written.getvalue() == "● convert    cached  01234567  4,000 rows as alpaca, messages, 3 dropped\n"
    written.seek(0)
    dropped = Artifact({}, "0123456789abcdef", Tree(()), {"rows": 3, "dropped": {"filtered": 3}, "formats": {}}, {}, {})
    follower.finished(RUN, "convert", Built(dropped, True, 0.0))
    assert "3 rows as nothing, 3 dropped" in written.getvalue()


def test_warnings_stand_below_the_line_of_their_stage() -> None:
    written = io.StringIO()
    finished = Screen(Console(file=written, width=80)).follower().finished
    packed = {"bins": 1, "fill": 0.5, "trained_tokens": 1, "tokens": 2, "dropped": {}}
    for stage, facts in (
        ("pack", packed),
        ("pack", {**packed, "warnings": [f"mine: [{n}]" for n in range(7)]}),
        ("merge", {"warning": "training changed nothing"}),
    ):
        finished(RUN, stage, Built(Artifact({}, "0123456789abcdef", Tree(()), facts, {}, {}), True, 0.0))
    lines = written.getvalue().splitlines()
    assert [line for line in lines if line.startswith("  ")] == [
        *(f"  ⚠ mine: [{n}]" for n in range(5)),
        "  ⚠ and 2 more: see `regrow inspect`",
        "  ⚠ training changed nothing",
    ]


@pytest.mark.parametrize(("value", "told"), [(4.23, "4.2 s"), (59.4, "59 s"), (65, "1:05"), (7387, "2:03:07")])
def test_durations(value: float, told: str) -> None:
    assert seconds(value) == told
