"""The flow against a real server: what a run leaves in the dashboard's database."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import Artifact, TaskRun

from flows.execute import Follower, following
from flows.graph import ORDER
from flows.parameters import StageName
from flows.run import Run
from flows.server import reporting_to
from stages.errors import UserError
from stages.gc import collect
from stages.store import open_store
from tests.stages.fetching import model_folder

MADE = ("fetch", "convert", "tokenize", "pack", "train")


@pytest.fixture
def client(prefect_api: Any) -> Iterator[SyncPrefectClient]:
    with reporting_to(prefect_api), get_client(sync_client=True) as client:
        yield client


def of_run(flow_run: UUID) -> filters.FlowRunFilter:
    return filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[flow_run]))


def task_runs(client: SyncPrefectClient, flow_run: UUID) -> dict[str, TaskRun]:
    return {task.name: task for task in client.read_task_runs(flow_run_filter=of_run(flow_run))}


def pages(client: SyncPrefectClient, flow_run: UUID) -> dict[str, Artifact]:
    return {str(page.key): page for page in client.read_artifacts(flow_run_filter=of_run(flow_run))}


def messages(client: SyncPrefectClient, flow_run: UUID) -> list[str]:
    chosen = filters.LogFilter(flow_run_id=filters.LogFilterFlowRunId(any_=[flow_run]))
    return [log.message for log in client.read_logs(chosen)]


def test_a_run_is_named_tagged_and_completed(trained: Any, client: SyncPrefectClient) -> None:
    run = client.read_flow_run(trained.made)
    assert re.fullmatch(r"tiny-[0-9a-f]{6}", run.name)
    assert {"recipe:tiny", "method:lora"} < set(run.tags)
    assert [tag for tag in run.tags if tag.startswith("model:")]
    assert run.state_name == "Completed"


def test_stages_are_tasks_that_say_what_they_made(trained: Any, client: SyncPrefectClient) -> None:
    tasks = task_runs(client, trained.made)
    assert set(tasks) == set(MADE)
    assert {task.state_name for task in tasks.values()} == {"Completed"}
    assert "240 rows" in str(tasks["convert"].state.message)


def test_the_graph_shows_which_stage_reads_which(trained: Any, client: SyncPrefectClient) -> None:
    tasks = task_runs(client, trained.made)
    names = {task.id: name for name, task in tasks.items()}
    read = {names[source.id] for source in tasks["train"].task_inputs["reads"]}
    assert read == {"fetch", "tokenize", "pack"}


def test_a_second_run_finds_every_stage_and_says_who_made_it(trained: Any, client: SyncPrefectClient) -> None:
    tasks = task_runs(client, trained.found)
    assert {name: task.state_name for name, task in tasks.items()} == dict.fromkeys(MADE, "Cached")
    assert re.search(r"made by run \d{8}-\d{6}-[0-9a-f]{6} on \d{4}-", str(tasks["train"].state.message))
    assert client.read_flow_run(trained.found).state_name == "Completed"


@pytest.mark.parametrize("which", ["made", "found"])
def test_every_run_shows_its_pages(which: str, trained: Any, client: SyncPrefectClient) -> None:
    shown = pages(client, getattr(trained, which))
    assert {"plan", "data-report", "packing", "loss-curve"} <= set(shown)
    assert all(len(str(page.data).encode()) < 100_000 for page in shown.values())
    assert "never made" in str(shown["plan"].data) or which == "found"
    assert "240" in str(shown["data-report"].data)
    assert "data:image/svg+xml;base64," in str(shown["loss-curve"].data)
    assert "| rows | 240 |" in str(shown["convert"].data) and "| dropped | 0 |" in str(shown["convert"].data)
    assert "| bytes copied |" in str(shown["fetch"].data) and "| tokens |" in str(shown["tokenize"].data)


def test_a_change_says_why_its_stage_runs_and_leaves_the_others(trained: Any, client: SyncPrefectClient) -> None:
    run = trained.tiny.run("+pack", pack={"global_batch": 2})
    states = {name: task.state_name for name, task in task_runs(client, run).items()}
    assert states == {"fetch": "Cached", "convert": "Cached", "tokenize": "Cached", "pack": "Completed"}
    assert "pack.global_batch 4 → 2" in str(pages(client, run)["plan"].data)


def test_what_a_stage_prints_is_in_the_log(trained: Any, client: SyncPrefectClient) -> None:
    log = "\n".join(messages(client, trained.made))
    assert "Loading weights" in log
    assert "\r" not in log


def test_bad_data_fails_the_run_with_one_line_and_no_traceback(make_tiny: Any, client: SyncPrefectClient) -> None:
    tiny = make_tiny()
    with (tiny.folder / "echo.jsonl").open("a") as rows:
        rows.write("not json\n")
    with pytest.raises(UserError, match=r"echo\.jsonl"):
        tiny.run("+convert")
    [run] = client.read_flow_runs(limit=1, sort="START_TIME_DESC")
    assert run.state_name == "Failed"
    assert "echo.jsonl" in str(run.state.message)
    assert not [message for message in messages(client, run.id) if "Traceback" in message]


@pytest.mark.full
def test_an_unknown_task_of_lm_eval_is_told_before_anything_runs(make_tiny: Any) -> None:
    tiny = make_tiny()
    with pytest.raises(UserError, match="gsm8k"):
        tiny.run(evaluate={"tasks": {"t": {"lm_eval": "gsm8kk"}}})
    store = open_store(tiny.runtime.store, tiny.runtime.cache)
    assert list(store.manifests()) == []


def test_steps_of_a_fetched_model_that_knows_none_are_told_before_anything_is_trained(make_tiny: Any) -> None:
    tiny = make_tiny()
    judge = model_folder(
        tiny.folder / "judge",
        **{
            "config.json": b'{"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}',
            "chat_template.jinja": b"t",
        },
    )
    task = {"source": "heldout", "reward_model": "kind", "steps": "product"}
    models = {"reward_models": {"kind": {"url": judge.as_uri()}}}
    with pytest.raises(UserError, match=r"^evaluate\.tasks\.echo\.steps: this reward model gives a whole answer one"):
        tiny.run(fetch=models, evaluate={"tasks": {"echo": task}})
    made = {stage for stage, _, _ in open_store(tiny.runtime.store, tiny.runtime.cache).manifests()}
    assert made == {"fetch"}


def test_one_stage_runs_as_a_flow_of_its_own(trained: Any, client: SyncPrefectClient) -> None:
    from flows.recipe import Recipe
    from flows.stage import stage

    with reporting_to(trained.tiny.api):
        recipe = Recipe.model_validate(trained.tiny.recipe)
        state = stage("tokenize", recipe, runtime=trained.tiny.runtime, return_state=True)
    run = client.read_flow_run(state.state_details.flow_run_id)
    assert run.name == "tokenize of tiny"
    assert set(task_runs(client, run.id)) == {"tokenize"}


def test_the_form_offers_every_stage() -> None:
    assert get_args(StageName) == ORDER


def test_a_destination_that_is_taken_is_told_before_anything_runs(make_tiny: Any) -> None:
    tiny = make_tiny()
    (tiny.folder / "out").mkdir()
    (tiny.folder / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        tiny.run()
    assert list(open_store(tiny.runtime.store, tiny.runtime.cache).manifests()) == []


def test_an_earlier_run_is_done_as_it_was_asked_for(make_tiny: Any) -> None:
    from flows.finetune import finetune
    from flows.recipe import Loaded, Recipe
    from flows.run import start

    tiny = make_tiny()
    recipe = Recipe.model_validate(tiny.recipe)
    earlier = start(
        Loaded(recipe=recipe, text="", path=""), tiny.runtime, open_store(tiny.runtime.store, tiny.runtime.cache)
    )
    earlier.record("finished")
    other = recipe.model_copy(update={"name": "other"})
    for asked, settings, says in ((recipe, ["train.seed=1"], "take `run` out"), (other, [], "recipe `tiny`, not of")):
        with reporting_to(tiny.api):
            state = finetune(asked, settings=settings, runtime=tiny.runtime, run=earlier.id, return_state=True)
        with pytest.raises(UserError, match=says):
            state.result()


def test_what_a_run_has_made_is_safe_from_gc_while_it_goes_on(make_tiny: Any) -> None:
    tiny, going = make_tiny(), []

    def look(run: Run, stage: str) -> None:
        """As if all that was made so far were older than gc's grace."""
        if stage == "pack":
            going.append(collect(run.store, grace=0.0))

    with following(Follower(started=look)):
        tiny.run("+pack")
    [report] = going
    assert report.kept.keys() == {"fetch", "convert", "tokenize"} and report.swept == {}


def test_strict_makes_anew_what_other_code_made_below_a_stage_that_gave_the_same_bytes(
    make_tiny: Any, client: SyncPrefectClient
) -> None:
    from flows.finetune import finetune
    from flows.recipe import Recipe

    tiny = make_tiny()
    tiny.run("+pack")
    for stage in ("convert", "tokenize"):
        for path in Path(tiny.runtime.store).glob(f"actions/{stage}/*.json"):
            manifest = json.loads(path.read_text())
            manifest["provenance"]["code"] = "0123"
            path.chmod(0o644)
            path.write_text(json.dumps(manifest))
    recipe = Recipe.model_validate(tiny.recipe)
    state = finetune(recipe, select=["+pack"], strict=True, runtime=tiny.runtime, return_state=True)
    state.result()
    states = {name: task.state_name for name, task in task_runs(client, state.state_details.flow_run_id).items()}
    assert states == {"fetch": "Cached", "convert": "Completed", "tokenize": "Completed", "pack": "Cached"}
