"""What a plan decides, where a changed line went unnoticed by all other tests."""

from pathlib import Path

import pytest

from flows.plan import differences, make_plan
from tests.flows.rehearsal import Rehearsal


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path)


def test_strict_makes_nothing_again_that_was_not_selected(rehearsal: Rehearsal) -> None:
    """Who asks for the training alone would wait for all data to be tokenized by the new library."""
    run, _ = rehearsal.run(10)
    action, old = run.action("pack"), run.artifacts["pack"]
    assert action is not None
    folder = rehearsal.folder / "pack again"
    folder.mkdir()
    (folder / "report.md").write_bytes((rehearsal.store.view(old.tree) / "report.md").read_bytes())
    rehearsal.store.commit(action, folder, old.facts, {"code": "0123"}, replace=True)
    assert make_plan(rehearsal.start(10), ("pack",), strict=True).to_run == ["pack"]
    alone = make_plan(rehearsal.start(10), ("train",), strict=True)
    assert (alone.step("pack").state, alone.to_run) == ("skipped", [])
    assert "other code" in alone.step("pack").drift


def test_what_is_forced_below_what_waits_is_forced_whatever_that_gives(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    plan = make_plan(rehearsal.start(10), force=("train", "merge"))
    assert [plan.step(stage).state for stage in ("train", "merge", "evaluate")] == ["runs", "runs", "unknown"]
    assert plan.step("merge").reason == "forced; depends on train"


def test_what_is_new_and_what_is_gone_is_told_as_a_difference() -> None:
    def document(config: dict[str, object], version: dict[str, int], **inputs: str) -> dict[str, object]:
        return {"inputs": inputs, "version": version, "config": config}

    before = document({"b": 1, "d": {"e": 1}}, {"train": 1, "objective:sft": 1}, plan="x", tokens="y")
    after = document({"b": 1, "c": 2, "d": {"e": 2}}, {"train": 2, "objective:dpo": 1}, plan="x", model="z")
    assert list(differences("train", before, after)) == [
        "model changed",
        "tokens changed",
        "version of train 1 → 2",
        "train.d.e 1 → 2",
        "train.c unset → 2",
    ]
    after["config"] = before["config"]  # which would say it, where it is another objective
    assert "version of objective:dpo unset → 1" in [*differences("train", before, after)]


def test_the_reason_is_the_difference_from_the_last_run_not_from_an_earlier_one(rehearsal: Rehearsal) -> None:
    for right in (10, 20):
        rehearsal.run(right)
    assert make_plan(rehearsal.start(30)).step("train").reason == "train.seed 20 → 30"


def test_a_run_has_made_only_what_it_made_itself(rehearsal: Rehearsal) -> None:
    run, _ = rehearsal.run(10)
    again = rehearsal.start(10)
    assert make_plan(again).to_run == []
    assert run.has_made("publish") and not again.has_made("publish")
