"""The dashboard in a real browser: whoever opens a run sees its name, its cached stages and its pages, and whoever
fills a deployment's form has a run that can be watched to its end."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Page, expect, sync_playwright

from tests.flows.raised import Raised

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 30_000
"""Milliseconds that a page may take on a busy machine."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page()
        page.set_default_timeout(SECONDS)
        expect.set_options(timeout=SECONDS)
        yield page
        browser.close()


def test_the_run_page_shows_name_tags_and_cached_stages(page: Page, trained: Any) -> None:
    page.goto(trained.tiny.api.page(trained.found))
    expect(page.get_by_text(re.compile(r"^tiny-[0-9a-f]{6}$")).first).to_be_visible()
    expect(page.get_by_text("method:lora").first).to_be_visible()
    page.get_by_role("tab", name="Task Runs").click()
    expect(page.get_by_text("Cached", exact=True)).to_have_count(5)


def test_the_run_page_lists_the_artifacts(page: Page, trained: Any) -> None:
    page.goto(trained.tiny.api.page(trained.made))
    page.get_by_role("tab", name="Artifacts").click()
    for key in ("plan", "data-report", "packing", "loss-curve"):
        expect(page.get_by_text(key, exact=True).first).to_be_visible()


def test_the_loss_curve_is_a_picture(page: Page, trained: Any) -> None:
    page.goto(trained.tiny.api.page(trained.made))
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("loss-curve", exact=True).first.click()
    page.locator("a[href*='/artifacts/artifact/']").first.click()
    picture = page.get_by_alt_text("loss over steps")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 300


WHOLE_RUN = 600_000
"""Milliseconds that a whole run may take on a busy machine."""
PAGES = {
    "plan": "never made",
    "data-report": "rows",
    "packing": "sequences",
    "loss-curve": "loss",
    "scores": "echo",
    "model-card": "form-made",
}
"""What a run shows, and a word that its page says."""


@pytest.mark.full
def test_a_run_is_started_from_its_form_and_watched_to_its_end(
    page: Page, raised: Raised, tmp_path: Path, tiny_model: Path
) -> None:
    recipe = written(tmp_path, tiny_model)
    base = raised.url.removesuffix("/api")
    page.goto(f"{base}/v2/deployments")
    page.get_by_role("link", name="recipe", exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()

    expect(page.get_by_role("heading", name="Parameters")).to_be_visible()
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text(re.compile("required", re.I)).first).to_be_visible()  # an empty form starts nothing
    page.locator("textarea").first.fill(str(recipe))
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("link", name="View run").click()

    expect(page.get_by_text(re.compile(r"^form-made-[0-9a-f]{6}$")).first).to_be_visible(timeout=WHOLE_RUN)
    expect(page.get_by_text("Running", exact=True).first).to_be_visible(timeout=WHOLE_RUN)
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=WHOLE_RUN)
    run = page.url
    for key, word in PAGES.items():
        page.goto(run)
        page.get_by_role("tab", name="Artifacts").click()
        page.get_by_text(key, exact=True).first.click()
        page.locator("a[href*='/artifacts/artifact/']").first.click()
        expect(page.get_by_text(word).first).to_be_visible()


def written(folder: Path, model: Path) -> Path:
    """A recipe's file over a random model, as a person would have it on the worker's machine."""
    turns = [{"role": "user", "content": "say abc"}, {"role": "assistant", "content": "abc"}]
    rows = [{"messages": turns, "question": f"say {n}", "answer": f"{n}"} for n in range(24)]
    for name, chosen in (("echo", rows[:20]), ("heldout", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    document = {
        "name": "form-made",
        "fetch": {
            "model": {"path": str(model)},
            "data": {
                "echo": {"files": str(folder / "echo.jsonl")},
                "heldout": {"files": str(folder / "heldout.jsonl"), "split": "heldout"},
            },
        },
        "pack": {"sequence_length": 128, "global_batch": 4, "deduplicate": False, "decontaminate": False},
        "train": {"lora": {"rank": 2}, "max_steps": 4},
        "evaluate": {"tasks": {"echo": {"source": "heldout", "max_new_tokens": 4}}},
        "publish": {"to": str(folder / "out"), "gate": {"require": "nothing"}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return folder / "recipe.yaml"
