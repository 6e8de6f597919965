"""What a model wrote while it trained: `regrow rollouts`, and its pages in the dashboard of a real server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from rich.console import Console

from flows.pages import completions_page, loss_page
from flows.rollouts import Rollout, show_rollouts
from flows.server import reporting_to
from stages.errors import UserError
from stages.identity import Action
from stages.store import Store, open_store
from stages.tables import read_table
from tests.flows.conftest import Tiny
from tests.flows.test_dashboard import picture, texts
from tests.flows.test_finetune_flow import pages

WEIGHT = -0.5


@pytest.fixture(scope="module")
def online(make_tiny: Callable[[], Tiny]) -> tuple[Tiny, UUID]:
    """Two steps of four completions, of which one prompt's are a step."""
    tiny = make_tiny()
    tiny.recipe["convert"] = {"format": "prompt_only", "fields": {"prompt": "question"}}
    rewards = {
        "short": {"reward": "length", "options": {"most": 4}},
        "digits": {"reward": "regex", "weight": WEIGHT, "options": {"pattern": "[0-9]"}},
    }
    options = {"rewards": rewards, "group_size": 4, "prompts_per_step": 1, "max_new_tokens": 8, "beta": 0.1}
    train = {"objective": "grpo", "objective_options": options, "precision": "fp32", "max_steps": 2}
    return tiny, tiny.run("+train", train=train)


@pytest.fixture
def store(online: tuple[Tiny, UUID]) -> Store:
    runtime = online[0].runtime
    return open_store(runtime.store, runtime.cache)


def shown(store: Store, what: str, step: int | None = None, worst: bool = False, as_json: bool = False) -> str:
    console = Console(width=80, force_terminal=False, highlight=False)
    with console.capture() as told:
        show_rollouts(store, what, step, worst, console, as_json)
    return told.get()


def lines(store: Store, what: str, step: int | None = None, worst: bool = False) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shown(store, what, step, worst, as_json=True).splitlines()]


@pytest.mark.full
def test_every_completion_is_a_line_of_json_by_run_by_name_and_by_key(store: Store) -> None:
    (_, record), *_ = store.runs()
    trained: Any = record["stages"]["train"]
    artifact = store.recall("train", trained["key"], trained["digest"])
    assert artifact is not None
    kept = read_table(store.view(artifact.tree) / "rollouts.arrow").to_pylist()
    found = lines(store, record["run"])
    assert found == lines(store, "tiny") == lines(store, trained["key"][:12])
    assert len(found) == len(kept) == 8
    for line, row in zip(found, kept, strict=True):
        rewards = dict(row["rewards"])
        assert line == {**row, "rewards": rewards, "total": rewards["short"] + WEIGHT * rewards["digits"]}


@pytest.mark.full
def test_one_step_and_the_worst_first(store: Store) -> None:
    assert [line["step"] for line in lines(store, "tiny", step=2)] == [2] * 4
    totals = [line["total"] for line in lines(store, "tiny", worst=True)]
    assert totals == sorted(totals) and len(totals) == 8
    with pytest.raises(UserError, match="nothing was written in step 3; the training has 2"):
        shown(store, "tiny", step=3)


@pytest.mark.full
def test_the_terminal_shows_step_prompt_completion_rewards_and_total_in_80_columns(store: Store) -> None:
    told = shown(store, "tiny", step=1)
    assert max(map(len, told.splitlines())) <= 80
    first = lines(store, "tiny", step=1)[0]
    short, digits, total = (f"{n:.3g}" for n in (*first["rewards"].values(), first["total"]))
    assert told.startswith(f"── step 1 · short {short} · digits {digits} · total {total}\n<|im_start|>user say ")
    assert "".join(first["completion"].split()) in "".join(told.split())


@pytest.mark.full
def test_what_wrote_nothing_is_said(store: Store, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    given = store.commit(Action("train", {"train": 1}, {"objective": "sft"}, {}), tmp_path, {}, {})
    with pytest.raises(UserError, match="this training wrote no completions; sft learns from given ones"):
        shown(store, f"train/{given.key}")
    key = next(key for stage, key, _ in store.manifests() if stage == "pack")
    with pytest.raises(UserError, match="is an artifact of pack: name a run, or the key of its training"):
        shown(store, f"pack/{key}")
    with pytest.raises(UserError, match="no run is called so"):
        shown(store, "nobody")


@pytest.mark.full
def test_the_dashboard_shows_completions_and_the_reward(online: tuple[Tiny, UUID], store: Store) -> None:
    tiny, run = online
    with reporting_to(tiny.api), get_client(sync_client=True) as client:
        made = pages(client, run)
    curves, written = str(made["loss-curve"].data), str(made["completions"].data)
    assert "![loss over steps]" in curves and "![reward over steps]" in curves
    for figure in ("reward", "completion length", "kl", "clip fraction"):
        assert f"| {figure} |" in curves
    assert "### Step 1\n" in written and "### Step 2\n" in written
    assert written.count("short **") == 8 and "say " in written


def test_rewards_have_a_curve_of_their_own_so_far() -> None:
    rows: list[dict[str, Any]] = [{"step": i + 1, "loss": 0.1, "reward": float(i)} for i in range(5)]
    page = loss_page([*rows, {"step": 6, "loss": 0.1}])  # a step that trains on the last batch once more
    assert {"step", "reward"} <= set(texts(picture(page.partition("![reward")[1] + page.partition("![reward")[2])))
    assert "![reward" not in loss_page([{"step": 1, "loss": 0.1}])


def test_a_completion_cannot_break_the_page() -> None:
    page = completions_page([Rollout(1, "say ```x```", "```\n# no heading", {"short": 0.25})])
    assert "````text\nsay ```x```\n````" in page and "````text\n```\n# no heading\n````" in page
    assert "short **0.25**" in page
