"""What a team does in the dashboard, in a real browser on the server and workers of `regrow up`: start a run from a
form and watch it to its end."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from playwright.sync_api import Page, expect

from tests.flows import browser
from tests.flows.conftest import tiny_recipe
from tests.flows.raised import Raised

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

PAGES = {
    "plan": "publish",
    "data-report": "Rows as they train",
    "packing": "sequences a step",
    "loss-curve": "grad norm",
    "scores": "difference",
    "model-card": "parrot",
    "parrot-history": "parrot/production",
}
"""What a whole run shows, and words that each page says."""


@pytest.fixture(scope="module")
def page(raised: Raised) -> Iterator[Page]:
    with browser.opened() as page:
        yield page


def dashboard(raised: Raised) -> str:
    return raised.url.removesuffix("/api")


def shown(raised: Raised, run: str) -> set[str]:
    """The keys of a run's artifacts, each of which must be small."""
    body = {"artifacts": {"flow_run_id": {"any_": [run]}}}
    found = httpx.post(f"{raised.url}/artifacts/filter", json=body).raise_for_status().json()
    assert all(len(json.dumps(artifact["data"])) < 100_000 for artifact in found)
    return {artifact["key"] for artifact in found}


def test_a_run_is_started_from_its_form_and_watched_to_its_end(
    page: Page, raised: Raised, tmp_path: Path, tiny_model: Path
) -> None:
    recipe = {**tiny_recipe(tmp_path, tiny_model), "name": "parrot"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    browser.open_form(page, dashboard(raised), "recipe")
    page.get_by_role("button", name="Submit").click()
    missing = page.get_by_text("'recipe' is a required property", exact=True)
    expect(missing).to_be_visible()
    browser.stored_recipe(page).fill(str(tmp_path / "recipe.yaml"))
    browser.stored_recipe(page).blur()
    expect(missing).to_be_hidden()  # what stands below it moves up then, the button too: a click before that misses
    browser.submit(page)
    browser.watch(page, "parrot", "Running")
    browser.watch(page, "parrot", "Completed")
    run = page.url
    assert shown(raised, run.rpartition("/")[2].partition("?")[0]) >= PAGES.keys()
    for key, words in PAGES.items():
        browser.open_artifact(page, run, key)
        expect(page.get_by_text(words).first).to_be_visible()
    browser.open_artifact(page, run, "plan")
    for stage in ("fetch", "train", "publish"):
        expect(page.get_by_role("row").filter(has=page.get_by_role("cell", name=stage, exact=True))).to_be_visible()
