"""Pages and charts: what they say, and that they fit."""

import base64
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.charts import Bar, chain, curve, image, interval_bars, nice_ticks, number, smoothed, thinned
from flows.history import LATEST, Event
from flows.pages import (
    MOST_BYTES,
    PAGES,
    facts_page,
    history_page,
    loss_page,
    packing_page,
    plan_page,
    scores_page,
    trimmed,
)
from flows.plan import Plan, Step
from stages.production import Move

LIMIT = 100_000
"""Bytes of a page that the dashboard keeps and loads without trouble."""

numbers = st.floats(-1e9, 1e9, allow_nan=False)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def picture(markdown: str) -> str:
    found = re.search(r"!\[[^\]]*\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", markdown)
    assert found, markdown[:200]
    return base64.b64decode(found[1]).decode()


@given(low=numbers, high=numbers, about=st.integers(2, 10))
def test_ticks_enclose_the_values_evenly(low: float, high: float, about: int) -> None:
    low, high = sorted((low, high))
    ticks = nice_ticks(low, high, about)
    step = ticks[1] - ticks[0]
    near = 1e-6 * max(step, abs(low), abs(high))
    assert ticks[0] <= low + near and ticks[-1] >= high - near
    assert 2 <= len(ticks) <= 2 * about + 3
    assert all(abs(b - a - step) <= near for a, b in pairwise(ticks))


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=400), st.integers(1, 100))
def test_thinning_keeps_the_ends_and_the_range(points: list[tuple[float, float]], most: int) -> None:
    points = sorted(points)
    thin = thinned(points, most)
    assert len(thin) == min(len(points), most)
    assert all(x <= y for (x, _), (y, _) in pairwise(thin))
    losses = [loss for _, loss in points]
    slack = 1e-6 * max(1.0, *(abs(loss) for loss in losses))
    assert all(min(losses) - slack <= loss <= max(losses) + slack for _, loss in thin)


def test_a_straight_line_stays_straight_when_smoothed() -> None:
    line = [(float(x), 100.0 - x) for x in range(100)]
    assert [loss for _, loss in smoothed(line)[5:-5]] == pytest.approx([loss for _, loss in line[5:-5]])


@pytest.mark.parametrize("steps", [1, 2, 7, 100_000])
def test_a_loss_curve_of_any_length_is_a_small_picture_with_named_axes(steps: int) -> None:
    page = loss_page([{"step": i + 1, "loss": 3 / (1 + i / 100), "tokens": 4096 * i} for i in range(steps)])
    assert len(page.encode()) < 40_000
    assert {"step", "loss"} <= set(texts(picture(page)))


def test_the_loss_curve_falls_where_the_loss_falls() -> None:
    svg = curve([(1, 4.0), (2, 3.0), (3, 1.0)], "loss")
    line = ElementTree.fromstring(svg).find("{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert heights == sorted(heights)  # down the page
    assert (heights[2] - heights[1]) / (heights[1] - heights[0]) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("losses", [[4.0, math.nan, 3.0, math.inf, 1.0], [math.nan]])
def test_what_is_no_number_is_left_out_of_a_curve(losses: list[float]) -> None:
    page = loss_page([{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)])
    line = ElementTree.fromstring(picture(page)).find("{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    assert len(line.attrib["points"].split()) == sum(map(math.isfinite, losses))
    assert {"step", "loss"} <= set(texts(picture(page))) and "nan" not in picture(page)


def test_bars_are_as_long_as_their_values() -> None:
    svg = interval_bars([Bar("a", 0.2, 0.1, 0.3, False), Bar("b", 0.8, 0.7, 0.9, True)], "score")
    bars = ElementTree.fromstring(svg).findall("{http://www.w3.org/2000/svg}rect")
    short, long = (float(bar.attrib["width"]) for bar in bars)
    assert long / short == pytest.approx(4, abs=0.02)
    assert {"a", "b", "0.2", "0.8", "score"} <= set(texts(svg))


def test_bars_below_zero_are_drawn() -> None:
    svg = interval_bars([Bar("worse", -0.2, -0.3, -0.1, True)], "difference")
    assert "-0.2" in texts(svg)


def test_labels_cannot_break_a_picture() -> None:
    from flows.charts import Box

    assert "<b>&" in texts(chain([Box("<b>&", '"', "#22c55e", False)]))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.0, "0"), (204000, "204,000"), (5.18e-06, "5.18e-06"), (0.12345, "0.123"), (72, "72")],
)
def test_numbers_read_well(value: float, shown: str) -> None:
    assert number(value) == shown


def test_the_plan_names_every_stage_its_state_and_its_reason() -> None:
    steps = [
        Step("pack", "cached", "", "a" * 64, drift="made by other code"),
        Step("train", "runs", "train.learning_rate 0.0001 → 0.0002", "b" * 64),
        Step("merge", "unknown", "depends on train"),
    ]
    page = plan_page(Plan("support|bot", "run-1", steps))
    assert {"pack", "cached", "train", "runs", "merge", "may run"} <= set(texts(picture(page)))
    for told in ("made by other code", "train.learning_rate 0.0001 → 0.0002", "depends on train", "`aaaaaaaa`"):
        assert told in page


@pytest.mark.parametrize(
    ("to", "shown"),
    [
        ("hf://ada/bot", "[hf://ada/bot](https://huggingface.co/ada/bot)"),
        ("https://models.example.com/bot", "<https://models.example.com/bot>"),
        ("s3://models/bot", "`s3://models/bot`"),
    ],
)
def test_the_plan_leads_to_the_history_the_run_before_and_where_the_model_goes(to: str, shown: str) -> None:
    name = {"key": "a" * 64, "digest": "b" * 64}
    before = Move(1, "2026-11-25T00:00:00Z", "promoted", name, name, "20261125-000000-c0ffee", None, "gate", "better")
    steps = [Step("publish", "runs", "never made")]
    page = plan_page(Plan("bot", "run-2", steps, to, before))
    assert "(/v2/artifacts/key/bot-history)" in page and shown in page
    assert "[20261125-000000-c0ffee](/v2/runs?tab=flow-runs&flow-run-search=c0ffee&start=" in page
    assert "in production" not in plan_page(Plan("bot", "run-1", steps, to))


def test_facts_are_told_in_words_with_every_reason() -> None:
    facts = {
        "rows": 12345,
        "dropped": {"no answer": 3, "a|b": 2},
        "unwritten": {},
        "formats": {"chat": 2},
        "likeness": {"top1_agreement": 0.9964},
    }
    page = facts_page(facts)
    for row in (
        "| rows | 12,345 |",
        "| dropped | 5 |",
        "| dropped: no answer | 3 |",
        "| dropped: a\\|b | 2 |",
        "| not written | 0 |",
        "| files read as: chat | 2 |",
        "| likeness to the trained adapter: the same likeliest token | 99.6% |",
    ):
        assert row in page
    many = facts_page({"dropped": {f"a reason of its own, number {n}": n for n in range(10_000)}})
    assert len(trimmed(many).encode()) < LIMIT


def test_scores_show_both_models_with_their_intervals() -> None:
    models = {"base": interval(0.2), "tuned": interval(0.7), "difference": interval(0.5), "better": "tuned"}
    scores: dict[str, Any] = {
        "tasks": {"a_very_long_task_name|with_bar": {"metric": "exact_match", "n": 1500, **models}},
        "heldout_loss": {**models, "tokens": 12345},
    }
    page = scores_page(scores)
    assert "0.700 [0.600,\u00a00.800]" in page and "+0.500" in page and "1,500" in page and "12,345 tokens" in page
    assert "a_very_long_task_name\\|with_bar" in page
    assert "0.7" in texts(picture(page))
    assert "Nothing" in scores_page({"tasks": {}, "heldout_loss": None})
    brief = scores_page(scores, brief=True)
    assert "| task | base | tuned |" in brief and "1,500" not in brief and "svg" not in brief


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def test_a_suite_of_hundreds_of_tasks_still_has_a_picture_that_fits() -> None:
    models = {name: interval(0.4) for name in ("base", "tuned", "production", "difference")}
    over = {"difference": interval(0.1), "better": "unclear"}
    task = {"metric": "acc,none", "n": 100, **models, "better": "tuned", "over_production": over}
    page = trimmed(scores_page({"tasks": {f"mmlu_subject_number_{i}": task for i in range(200)}, "heldout_loss": None}))
    assert len(page.encode()) < LIMIT
    assert "the first 12 of 200 tasks" in " ".join(texts(picture(page)))
    assert page.count("mmlu_subject_number_199") == 2, "the tables have all of them"


def test_a_history_of_long_reasons_fits() -> None:
    why = "; ".join(f"task {i}: clearly worse than the model in production, -0.500 [-0.610, -0.390]" for i in range(20))
    scores = {f"task-{i}": interval(0.5) for i in range(20)}
    at = "2026-11-26T00:00:00Z"
    events = [Event(at, "gate failed", "a" * 64, f"run-{i}", "", why, scores) for i in range(LATEST)]
    page = history_page("bot", events, None)
    assert len(page.encode()) < LIMIT and "names no model yet" in page
    assert trimmed(page) == page, "nothing of it is cut"


def test_a_page_that_is_too_long_is_cut_and_says_so() -> None:
    page = trimmed("ä line\n" * 100_000)
    assert len(page.encode()) < MOST_BYTES + 200
    assert "800,000 bytes" in page and page.count("\ufffd") == 0
    assert trimmed("short") == "short"


def test_the_card_loses_the_yaml_before_it(tmp_path: Path) -> None:
    [card] = PAGES["publish"]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Model\n\n---\n\nmore\n")
    assert card.markdown(tmp_path).strip() == "# Model\n\n---\n\nmore"


def test_packing_tells_fill_and_padding(tmp_path: Path) -> None:
    plan = {
        "fill": 0.967,
        "bins": 190,
        "sequence_length": 512,
        "global_batch": 8,
        "steps": 24,
        "documents": 1488,
        "max_documents": 20,
        "truncated": 3,
        "tokens": 98123,
        "trained_tokens": 41000,
    }
    page = packing_page(json.loads(json.dumps(plan)))
    assert "96.7%" in page and "3.3%" in page and "98,123" in page


def test_keys_are_what_prefect_allows() -> None:
    keys = [page.key for pages in PAGES.values() for page in pages]
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in keys)
    assert len(set(keys)) == len(keys)


def test_a_picture_can_stand_in_a_table_cell() -> None:
    assert "|" not in image("<svg/>", "title")
