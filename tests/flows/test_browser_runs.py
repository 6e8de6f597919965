"""What a team does in the dashboard, in a real browser on the server and workers of `regrow up`: start a run from a
form and watch it to its end, say yes or no to a model that waits for a person."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import httpx
import pytest
import yaml
from playwright.sync_api import Page, expect

from stages.production import production
from stages.runtime import Runtime
from tests.flows import browser
from tests.flows.conftest import tiny_recipe
from tests.flows.raised import Raised
from tests.flows.rehearsal import Rehearsal
from tests.flows.victim import Victim

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

PAGES = {
    "plan": "publish",
    "fetch": "bytes copied",
    "convert": "dropped",
    "tokenize": "tokens",
    "merge": "likeness",
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
        browser.expect_to_fit(page)
    browser.open_artifact(page, run, "plan")
    for stage in ("fetch", "train", "publish"):
        expect(page.get_by_role("row").filter(has=page.get_by_role("cell", name=stage, exact=True))).to_be_visible()
    page.get_by_role("link", name="The history of parrot").click()
    page.locator("a[href*='/artifacts/artifact/']").first.click()
    page.get_by_role("link", name=re.compile(r"^\d{8}-\d{6}-[0-9a-f]{6}$")).first.click()
    expect(page.get_by_role("link", name=re.compile(r"^parrot-[0-9a-f]{6}$")).first).to_be_visible()


def test_no_page_is_wider_than_a_desktop(page: Page, raised: Raised) -> None:
    for path in ("dashboard", "runs", "deployments", "artifacts", "work-pools", "automations"):
        page.goto(f"{dashboard(raised)}/v2/{path}")
        page.wait_for_load_state("networkidle")
        browser.expect_to_fit(page)


def test_a_run_is_cancelled_by_its_button(page: Page, raised: Raised, tmp_path: Path, tiny_model: Path) -> None:
    recipe = tiny_recipe(tmp_path, tiny_model)
    recipe["train"]["epochs"] = 12
    victim = Victim(raised, recipe, Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache", save_seconds=0.5))
    run = victim.send()
    victim.trains(run)
    page.goto(f"{dashboard(raised)}/v2/runs/flow-run/{run}")
    browser.cancel(page)
    browser.watch(page, "tiny", "Cancelled")
    victim.left_nothing()


def waiting(page: Page, raised: Raised, rehearsal: Rehearsal) -> UUID:
    """A retraining whose model is twice as good as the one in production; its page, as it waits for a person."""
    run = raised.send("retrain/scheduled", rehearsal.ready(20, approval=True))
    raised.wait(run, lambda found: found.state is not None and (found.state.is_paused() or found.state.is_final()))
    page.goto(f"{dashboard(raised)}/v2/runs/flow-run/{run}")
    expect(page.get_by_text("Suspended", exact=True).first).to_be_visible()
    return run


def answer(page: Page, promote: bool, why: str) -> None:
    """Fill in the form that the run waits for."""
    form = browser.approval(page)
    expect(form.get_by_text("spelling").first).to_be_visible()
    expect(form.get_by_text("0.500").first).to_be_visible()
    if promote:
        form.get_by_role("switch").click()
    form.get_by_label("Why").fill(why)
    form.get_by_label("Your name").fill("ada")
    form.get_by_role("button", name="Resume").click()
    expect(form).to_be_hidden()


def delivered(rehearsal: Rehearsal) -> str:
    """The run whose model is where the recipe publishes to."""
    return str(json.loads((rehearsal.folder / "out/lineage.json").read_text())["run"])


def test_a_yes_promotes_what_was_shown_whatever_came_meanwhile(page: Page, raised: Raised, tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path, name="asked-yes")
    first, _ = rehearsal.run(10)
    run = waiting(page, raised, rehearsal)
    asked = next(record for _, record in rehearsal.store.runs() if record["run"].endswith(str(run)[-6:]))
    newer, outcome = rehearsal.run(30, approval=True)
    assert outcome.production == "waits" and rehearsal.stands == first.artifacts["merge"].key
    (tmp_path / "rows.jsonl").write_text('{"question": "new", "answer": "new"}\n')
    answer(page, True, "reads well")
    browser.watch(page, rehearsal.name, "Completed")
    assert rehearsal.stands == asked["stages"]["merge"]["key"] != newer.artifacts["merge"].key
    found = production(rehearsal.store, rehearsal.name)
    assert found and (found.now.by, found.now.run) == ("ada", asked["run"]) and "reads well" in found.now.why
    assert delivered(rehearsal) == asked["run"]


def test_a_no_leaves_production_alone_and_is_in_the_history(page: Page, raised: Raised, tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path, name="asked-no")
    first, _ = rehearsal.run(10)
    run = waiting(page, raised, rehearsal)
    answer(page, False, "too terse")
    browser.watch(page, rehearsal.name, "Refused")
    state = raised.ended(run).state
    assert state and "too terse" in str(state.message), state
    assert rehearsal.stands == first.artifacts["merge"].key
    assert delivered(rehearsal) == first.id
    browser.open_artifact(page, page.url, "asked-no-history")
    expect(page.get_by_text("declined by ada")).to_be_visible()
