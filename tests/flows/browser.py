"""A real Chromium on the dashboard, for tests: the page, and where things are on it."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from playwright.sync_api import Locator, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

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
WHOLE_RUN = 900_000
"""Milliseconds that a whole run may take there."""


@contextmanager
def opened() -> Iterator[Page]:
    """A tab of a browser of its own, as wide as a desktop."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(SECONDS)
        expect.set_options(timeout=SECONDS)
        yield page
        browser.close()


def open_form(page: Page, dashboard: str, deployment: str) -> None:
    """From the list of deployments to the form of one."""
    page.goto(f"{dashboard}/v2/deployments?page=1&sort=NAME_ASC&limit=50")
    page.get_by_role("link", name=deployment, exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    expect(page.get_by_role("heading", name="Parameters")).to_be_visible()


def stored_recipe(page: Page) -> Locator:
    """Where a form takes a recipe's file or name."""
    return page.get_by_role("tabpanel", name="A stored recipe").get_by_role("textbox")


def choices(page: Page, label: str) -> Locator:
    """Open a list to choose from; return its entries. Where the form was drawn anew under a click, nothing opens, and
    one clicks again."""
    entries = page.get_by_role("option")
    for patience in (2_000, 4_000, 8_000, SECONDS):
        page.get_by_label(label).click()
        with suppress(PlaywrightTimeout):
            entries.first.wait_for(timeout=patience)
            break
    return entries


def submit(page: Page) -> None:
    """Send the form, and follow the link to the run that it made."""
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("link", name="View run").click()


def watch(page: Page, name: str, state: str) -> None:
    """Return when the run on the page is called `name` and has come to `state`."""
    expect(page.get_by_text(re.compile(rf"^{name}-[0-9a-f]{{6}}$")).first).to_be_visible(timeout=WHOLE_RUN)
    expect(page.get_by_text(state, exact=True).first).to_be_visible(timeout=WHOLE_RUN)


def open_artifact(page: Page, run: str, key: str) -> None:
    """From a run's page to one of its artifacts."""
    page.goto(run)
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text(key, exact=True).first.click()
    page.locator("a[href*='/artifacts/artifact/']").first.click()


def expect_to_fit(page: Page) -> None:
    """The page does not scroll sideways, once its pictures have found their width."""
    expect(page.locator("main")).to_be_visible()
    page.wait_for_function(
        """() => [document.documentElement, document.querySelector('main')]
            .every(one => one.scrollWidth <= one.clientWidth)"""
    )


def cancel(page: Page) -> None:
    """Cancel the run on the page."""
    page.get_by_role("button", name="Open menu").first.click()
    page.get_by_role("menuitem", name="Cancel").click()
    page.get_by_role("button", name="Cancel Flow Run").click()


def approval(page: Page) -> Locator:
    """The form of a run that waits for a person."""
    page.get_by_role("button", name="Open menu").first.click()
    page.get_by_role("menuitem", name="Resume").click()
    return page.get_by_role("dialog")
