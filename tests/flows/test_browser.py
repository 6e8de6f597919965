"""The dashboard in a real browser: whoever opens a run sees its name, its cached stages and its pages."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

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
