"""`regrow rollouts`: what a model wrote while it trained, of a training on a real server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from rich.console import Console

from flows.rollouts import show_rollouts
from stages.errors import UserError
from stages.identity import Action
from stages.store import Store, open_store
from stages.tables import read_table
from tests.flows.conftest import Tiny

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


def test_one_step_and_the_worst_first(store: Store) -> None:
    assert [line["step"] for line in lines(store, "tiny", step=2)] == [2] * 4
    totals = [line["total"] for line in lines(store, "tiny", worst=True)]
    assert totals == sorted(totals) and len(totals) == 8
    with pytest.raises(UserError, match="nothing was written in step 3; the training has 2"):
        shown(store, "tiny", step=3)


def test_the_terminal_shows_step_prompt_completion_rewards_and_total_in_80_columns(store: Store) -> None:
    told = shown(store, "tiny", step=1)
    assert max(map(len, told.splitlines())) <= 80
    first = lines(store, "tiny", step=1)[0]
    short, digits, total = (f"{n:.3g}" for n in (*first["rewards"].values(), first["total"]))
    assert told.startswith(f"── step 1 · short {short} · digits {digits} · total {total}\n<|im_start|>user say ")
    assert "".join(first["completion"].split()) in "".join(told.split())


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
