"""The dashboard in a real browser: whoever opens a run sees its name, cached stages and pages; whoever opens the form
of a deployment is told what goes where, and starts what was filled in and nothing else."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Page, expect

from flows.server import Api
from tests.flows import browser

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser.opened() as page:
        yield page


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
    browser.open_artifact(page, trained.tiny.api.page(trained.made), "loss-curve")
    picture = page.get_by_alt_text("loss over steps")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 300


def test_the_plan_leads_to_the_history_of_its_name(page: Page, trained: Any) -> None:
    browser.open_artifact(page, trained.tiny.api.page(trained.made), "plan")
    link = page.get_by_role("link", name="The history of tiny")
    assert link.get_attribute("href") == "/v2/artifacts/key/tiny-history"


def test_what_came_out_of_a_stage_is_a_table(page: Page, trained: Any) -> None:
    browser.open_artifact(page, trained.tiny.api.page(trained.made), "convert")
    row = page.get_by_role("row").filter(has=page.get_by_role("cell", name="rows", exact=True))
    expect(row.get_by_role("cell", name="240", exact=True)).to_be_visible()


def test_the_pages_ask_nobody_but_their_server(page: Page, trained: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{trained.tiny.api.url.removesuffix('/api')}/v2/dashboard")
    page.goto(trained.tiny.api.page(trained.made))
    page.wait_for_load_state("networkidle")
    hosts = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}


@pytest.fixture(scope="module")
def registered(prefect_api: Api) -> Api:
    """A server with all deployments, and no worker."""
    command = [sys.executable, "-m", "flows.deployments"]
    subprocess.run(command, env={**os.environ, "PREFECT_API_URL": prefect_api.url}, check=True, timeout=300)
    return prefect_api


def started(api: Api, deployment: str) -> list[dict[str, Any]]:
    """The runs of a deployment."""
    body = {"deployments": {"name": {"any_": [deployment]}}}
    found: list[dict[str, Any]] = httpx.post(f"{api.url}/flow_runs/filter", json=body).raise_for_status().json()
    return found


def test_the_form_of_a_stage_says_what_goes_where(page: Page, registered: Api) -> None:
    browser.open_form(page, registered.url.removesuffix("/api"), "train")
    expect(page.get_by_text("Recipe keys to override, each an item")).to_be_visible()
    page.get_by_role("tab", name="A recipe, written here").click()
    expect(page.get_by_text("At its highest, after the warmup.")).to_be_visible()
    rate = page.get_by_label("learning_rate (Optional)", exact=True)
    assert (rate.input_value(), rate.get_attribute("max")) == ("0.0002", "1")
    expect(browser.choices(page, "Select method")).to_have_text(["lora", "full"])


def test_what_is_filled_in_is_what_the_run_gets(page: Page, registered: Api) -> None:
    browser.open_form(page, registered.url.removesuffix("/api"), "tokenize")
    browser.stored_recipe(page).fill("quickstart")
    page.get_by_role("switch").first.click()
    browser.submit(page)
    expect(page.get_by_text("Scheduled", exact=True).first).to_be_visible()
    [run] = started(registered, "tokenize")
    filled = {name: run["parameters"][name] for name in ("stage", "recipe", "force")}
    assert filled == {"stage": "tokenize", "recipe": "quickstart", "force": True}
