"""The events that automations wait for, on a real server, and what `deployments/automations.yaml` makes of them."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from jinja2 import Environment, StrictUndefined
from prefect.client.orchestration import get_client
from prefect.client.schemas import filters

from flows.finetune import finetune, finished
from flows.retrain import retrain
from flows.server import Api, reporting_to
from flows.upkeep import promote, rollback
from stages.runtime import Runtime
from tests.flows.raised import eventually
from tests.flows.rehearsal import Rehearsal

AUTOMATIONS = Path(__file__).parents[2] / "deployments" / "automations.yaml"


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path, name="heard")


def events(api: Api, name: str, count: int) -> list[dict[str, Any]]:
    """The events about a name's model, as soon as there are so many; oldest first."""
    resource = {"id": [f"regrow.model.{name}"]}

    def read() -> list[dict[str, Any]]:
        answer = httpx.post(f"{api.url}/events/filter", json={"filter": {"resource": resource, "order": "ASC"}})
        found: list[dict[str, Any]] = answer.raise_for_status().json()["events"]
        return found

    found: list[dict[str, Any]] = eventually(read, lambda found: len(found) >= count)
    return found


def rendered(action: dict[str, Any], event: dict[str, Any]) -> dict[str, str]:
    """The action's templates with the event filled in; a name that the event does not have is an error."""
    label = {**event["resource"], "name": event["resource"]["prefect.resource.name"]}
    values = {"event": {**event, "resource": label}}
    jinja = Environment(undefined=StrictUndefined)
    texts = {name: text for name, text in action.items() if isinstance(text, str) and "{{" in text}
    return {name: jinja.from_string(text).render(values) for name, text in texts.items()}


def test_what_automations_say_of_an_event_is_in_it(rehearsal: Rehearsal, prefect_api: Api) -> None:
    runtime = Runtime(store=rehearsal.store.url, cache=rehearsal.folder / "cache")
    first, _ = rehearsal.run(30)
    with reporting_to(prefect_api):
        worse, outcome = rehearsal.run(10)
        finished(worse, outcome)
        promote("heard", what=worse.id, anyway=True, runtime=runtime)
        rollback("heard", runtime=runtime)
        better, outcome = rehearsal.run(40)
        finished(better, outcome)
    found = events(prefect_api, "heard", 4)
    told = {"regrow.gate.failed": [], "regrow.model.published": [], "regrow.model.rolled-back": []}  # type: ignore[var-annotated]
    for event in found:
        told[event["event"]].append(event)
        assert {"run", "recipe", "reasons", "scores"} <= event["payload"].keys()
        assert event["payload"]["scores"]["spelling"]["value"] in (0.25, 0.75, 1.0)
    assert [len(each) for each in told.values()] == [1, 2, 1]
    said: dict[str, list[str]] = {}
    for automation in yaml.safe_load(AUTOMATIONS.read_text())["automations"]:
        for name in automation["trigger"]["expect"]:
            for event in told[name]:
                said.setdefault(name, []).extend(rendered(automation["actions"][0], event).values())
    subject, body = said["regrow.gate.failed"]
    assert subject == "heard was not published" and "clearly worse than the model in production" in body
    models = [json.loads(text) for text in said["regrow.model.published"] + said["regrow.model.rolled-back"]]
    made = [run.artifacts["merge"].key for run in (worse, better, first)]
    assert models == [{"name": "heard", "model": key} for key in made]


def test_a_retraining_that_finds_every_stage_made_announces_what_it_promotes(tmp_path: Path, prefect_api: Api) -> None:
    """The run that made them was killed before it could."""
    rehearsal = Rehearsal(tmp_path, name="found")
    made = rehearsal.make(rehearsal.start(20))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(made.loaded.text)
    runtime = Runtime(store=rehearsal.store.url, cache=tmp_path / "cache")
    with reporting_to(prefect_api), get_client(sync_client=True) as client:
        ended = retrain(str(recipe), runtime=runtime, return_state=True)
        again = retrain(str(recipe), runtime=runtime, return_state=True)
        wanted = filters.ArtifactFilter(key=filters.ArtifactFilterKey(any_=["found-history"]))
        [page] = client.read_artifacts(artifact_filter=wanted)
    assert ended.name == "Completed" and "found/production now names this model" in str(ended.message)
    assert again.name == "NothingNew"
    [event] = events(prefect_api, "found", 1)
    assert event["event"] == "regrow.model.published" and event["payload"]["model"] == rehearsal.stands
    assert event["payload"]["run"] in str(page.data)


def test_a_page_that_the_store_cannot_give_ends_no_run(tmp_path: Path, prefect_api: Api) -> None:
    rehearsal = Rehearsal(tmp_path, name="pageless")
    told = rehearsal.ready(20)
    rehearsal.store.objects.put("runs/long-ago.json", b"{")  # the history's page reads the record of every run
    with reporting_to(prefect_api):
        state = finetune(told["recipe"], runtime=Runtime(**told["runtime"]), return_state=True)
    assert state.is_completed(), state
    [event] = events(prefect_api, "pageless", 1)
    assert event["event"] == "regrow.model.published"
