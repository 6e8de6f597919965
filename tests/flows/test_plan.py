"""Plan and execution of a whole chain without Prefect: reasons, early cutoff, regrowth, selection, shared buckets."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.execute import execute
from flows.plan import Plan, differences, make_plan
from flows.recipe import Loaded, Recipe
from flows.run import Run, start
from stages.errors import UserError
from stages.objects import blob_path
from stages.runtime import Runtime
from stages.store import open_store
from tests.flows.conftest import Tiny
from tests.flows.rehearsal import Rehearsal

CHAIN = ("fetch", "convert", "tokenize", "pack")
"""The stages that need no torch: seconds, not minutes."""


def rows(*words: str) -> str:
    turns = [[{"role": "user", "content": f"say {w}"}, {"role": "assistant", "content": w}] for w in words]
    return "".join(json.dumps({"messages": t}) + "\n" for t in turns)


@dataclass
class Host:
    """A machine with a cache of its own, on some store."""

    store: str
    cache: Path
    recipe: dict[str, Any] = field(repr=False)

    def start(self, **sections: Any) -> Run:
        recipe = copy.deepcopy(self.recipe)
        for name, changes in sections.items():
            recipe[name] = recipe.get(name, {}) | changes
        runtime = Runtime(store=self.store, cache=self.cache)
        store = open_store(self.store, self.cache)
        return start(Loaded(recipe=Recipe.model_validate(recipe), text="", path=""), runtime, store)

    def plan(self, *selectors: str, **sections: Any) -> Plan:
        return make_plan(self.start(**sections), selectors or ("+pack",))

    def run(self, *, force: str = "", **sections: Any) -> Run:
        run = self.start(**sections)
        for stage in CHAIN:
            execute(run, stage, force=stage == force)
        run.record("finished")
        run.become_baseline()
        return run


@pytest.fixture
def make_host(tmp_path: Path, tiny_model: Path) -> Callable[..., Host]:
    data = tmp_path / "data"
    data.mkdir()
    (data / "one.jsonl").write_text(rows("a", "b"))
    recipe = {
        "name": "chain",
        "fetch": {"model": {"path": str(tiny_model)}, "data": {"words": {"files": str(data / "*.jsonl")}}},
        "pack": {"sequence_length": 64, "global_batch": 2},
    }

    def make(name: str = "host", store: str = "") -> Host:
        return Host(store or str(tmp_path / "store"), tmp_path / name, recipe)

    return make


def states(plan: Plan) -> dict[str, str]:
    return {s.stage: s.state for s in plan.steps if s.stage in CHAIN}


def test_what_would_run_and_why(make_host: Callable[..., Host], tmp_path: Path) -> None:
    host = make_host()
    first = host.plan()
    assert states(first) == {"fetch": "runs", "convert": "unknown", "tokenize": "unknown", "pack": "unknown"}
    assert first.step("fetch").reason == "never made"
    host.run()
    assert set(states(host.plan()).values()) == {"cached"}
    changed = host.plan(pack={"sequence_length": 128, "global_batch": 2})
    assert states(changed) == {"fetch": "cached", "convert": "cached", "tokenize": "cached", "pack": "runs"}
    assert changed.step("pack").reason == "pack.sequence_length 64 → 128"


def test_new_data_costs_only_itself_and_is_named(make_host: Callable[..., Host], tmp_path: Path) -> None:
    host = make_host()
    before = host.run()
    (tmp_path / "data" / "two.jsonl").write_text(rows("c"))
    plan = host.plan()
    assert plan.step("fetch").state == "runs"
    assert "is new" in plan.step("fetch").reason
    after = host.run()
    for stage in ("fetch", "convert", "tokenize"):
        old, new = before.artifacts[stage].parts, after.artifacts[stage].parts
        assert {n: new[n] for n in old} == old, "what was there is not made again"
        assert len(new) == len(old) + 1


def test_an_upstream_rerun_with_the_same_bytes_stops_there(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host.run()
    again = host.run(force="convert")
    assert again.made == {"convert"}, "tokenize and pack are still found: their inputs' bytes did not change"
    # Another config that gives the same bytes has another key, and stops the rerun just the same.
    other = host.run(convert={"bad_rows": "drop"})
    assert other.made == {"convert"}


def test_a_deleted_blob_is_a_miss_with_its_reason_and_grows_back(make_host: Callable[..., Host]) -> None:
    host = make_host()
    run = host.run()
    lost = next(f for f in run.artifacts["tokenize"].tree.files if f.path.endswith("tokens.arrow"))
    run.store.objects.delete(blob_path(lost.sha256))
    plan = host.plan(pack={"seed": 7})
    assert plan.step("tokenize").state == "runs"
    assert "grows back" in plan.step("tokenize").reason and lost.path in plan.step("tokenize").reason
    grown = host.run(pack={"seed": 7})
    assert grown.artifacts["tokenize"].digest == run.artifacts["tokenize"].digest
    assert grown.store.missing(grown.artifacts["tokenize"].tree) == []


def test_a_lost_blob_of_what_a_run_is_for_grows_back_although_all_is_made(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path)
    run, _ = rehearsal.run(20)
    lost = {}
    for stage in ("merge", "publish", "tokenize"):
        [lost[stage], *_] = run.artifacts[stage].tree.files
        rehearsal.store.objects.delete(blob_path(lost[stage].sha256))
    plan = make_plan(rehearsal.start(20))
    assert plan.to_run == ["merge", "evaluate", "publish"], "nobody reads the tokens any more"
    assert (plan.step("evaluate").state, plan.step("evaluate").reason) == ("unknown", "depends on merge")
    for stage in ("merge", "publish"):
        assert plan.step(stage).regrows and lost[stage].path in plan.step(stage).reason
    assert make_plan(rehearsal.start(20), ("+train",)).to_run == [], "which was not asked for the weights"


@pytest.mark.full
def test_a_run_grows_back_the_weights_that_are_lost(make_tiny: Callable[[], Tiny]) -> None:
    tiny = make_tiny()
    tiny.run()
    store = open_store(tiny.runtime.store, tiny.folder / "looking")
    [(stage, key, _)] = [found for found in store.manifests() if found[0] == "merge"]
    made = store.find(stage, key)
    assert made is not None
    [lost] = [file for file in made.tree.files if file.path.endswith(".safetensors")]
    store.objects.delete(blob_path(lost.sha256))
    tiny.run()
    assert store.missing(made.tree) == [] and store.find(stage, key).digest == made.digest  # type: ignore[union-attr]
    _, newest = next(store.runs())
    assert [name for name, told in newest["stages"].items() if told["made"]] == ["merge"]


def test_a_flipped_byte_is_found_quarantined_and_grows_back(make_host: Callable[..., Host], tmp_path: Path) -> None:
    host = make_host()
    run = host.run()
    bad = next(f for f in run.artifacts["tokenize"].tree.files if f.path.endswith("tokens.arrow"))
    blob = tmp_path / "store" / blob_path(bad.sha256)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(bytes(data))
    elsewhere = make_host("another-cache")
    grown = elsewhere.run(pack={"seed": 8})
    assert grown.artifacts["tokenize"].digest == run.artifacts["tokenize"].digest
    assert list((tmp_path / "store" / "quarantine").rglob("*"))


def test_a_stage_whose_inputs_were_never_made_names_the_selector(make_host: Callable[..., Host]) -> None:
    with pytest.raises(UserError, match=r"select `\+pack`"):
        make_host().plan("pack")


def test_two_hosts_share_one_bucket(make_host: Callable[..., Host], s3: Any) -> None:
    one, two = make_host("one", s3.url), make_host("two", s3.url)
    assert one.run().made == set(CHAIN)
    assert set(states(two.plan()).values()) == {"cached"}
    shared = two.run(pack={"seed": 3})
    assert shared.made == {"pack"}


def test_a_run_uses_what_its_sources_resolved_to(make_host: Callable[..., Host], tmp_path: Path) -> None:
    host = make_host()
    run = host.start()
    run.record("started")
    (tmp_path / "data" / "two.jsonl").write_text(rows("late"))
    resumed = start(run.loaded, run.runtime, run.store, run.store.read_run(run.id))
    assert resumed.parts == run.parts
    assert resumed.id == run.id


def test_drift_is_told_and_decides_only_when_strict(make_host: Callable[..., Host]) -> None:
    host = make_host()
    run = host.run()
    old = run.artifacts["pack"]
    store = run.store
    action = run.action("pack")
    assert action is not None
    folder = host.cache / "copy"
    folder.mkdir()
    for file in store.view(old.tree).rglob("*"):
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    store.commit(action, folder, old.facts, {**old.provenance, "code": "0123"}, replace=True)
    assert host.plan().step("pack").state == "cached"
    assert "other code" in host.plan().step("pack").drift
    assert make_plan(host.start(), ("+pack",), strict=True).step("pack").state == "runs"


def test_a_run_of_one_stage_does_not_forget_the_reasons_of_the_others(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host.run()
    only = host.start()
    for stage in ("fetch", "convert"):
        execute(only, stage)
    only.become_baseline()
    assert host.plan(pack={"seed": 9}).step("pack").reason.startswith("pack.")


def test_only_an_objective_that_compares_scores_the_tokens_and_finds_all_before_it(
    make_host: Callable[..., Host],
) -> None:
    host = make_host()
    host.run()
    supervised, compared = host.plan("+train"), host.plan("+train", train={"objective": "dpo"})
    assert "score" not in [step.stage for step in supervised.steps]
    assert states(compared) == dict.fromkeys(CHAIN, "cached")
    assert (compared.step("score").state, compared.step("train").state) == ("runs", "unknown")
    with pytest.raises(UserError, match="score: the objective sft has no use for it"):
        host.plan("score")


def test_what_is_forced_must_be_selected(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host.run()
    with pytest.raises(UserError, match="--force tokenize: the run leaves that out"):
        make_plan(host.start(), ("pack",), force=("pack", "tokenize"))
    assert make_plan(host.start(), ("pack",), force=("tokenize+",)).step("pack").reason == "forced"


def test_another_objective_reruns_only_what_depends_on_it(make_host: Callable[..., Host], tmp_path: Path) -> None:
    host = make_host()
    host.run()

    def keys(**train: Any) -> dict[str, str]:
        run = host.start(train=train)
        for stage in CHAIN:
            execute(run, stage)
            assert stage not in run.made, "what is there is found"
        found = {}
        for stage in run.stages[len(CHAIN) : run.stages.index("train") + 1]:
            action = run.action(stage)
            assert action is not None
            found[stage] = action.key
            (tmp_path / "made").mkdir(exist_ok=True)
            (tmp_path / "made/log_probs.arrow").write_bytes(b"stands for what score writes")
            run.artifacts[stage] = run.store.commit(action, tmp_path / "made", {}, {})
        return found

    dpo, ipo, kto, orpo = (
        keys(objective="dpo"),
        keys(objective="dpo", objective_options={"loss": "ipo"}),
        keys(objective="kto"),
        keys(objective="orpo"),
    )
    assert dpo["score"] == ipo["score"] == kto["score"], "the model before training is scored once"
    assert "score" not in orpo
    assert len({each["train"] for each in (dpo, ipo, kto, orpo)}) == 4


def test_reasons_name_what_was_changed_and_nothing_that_follows_from_it() -> None:
    def told(before: Any, after: Any, versions: Any = ({}, {}), stage: str = "convert") -> list[str]:
        documents = [{"inputs": {}, "version": v, "config": c} for v, c in zip(versions, (before, after), strict=True)]
        return list(differences(stage, *documents))

    many = {"format:alpaca": 3, "format:auto": 1, "format:completion": 1, "format:messages": 3}
    assert told({"format": "auto"}, {"format": "messages"}, (many, {"format:messages": 3})) == [
        "convert.format auto → messages"
    ]
    assert told({"format": "auto"}, {"format": "auto"}, (many, {**many, "format:new": 1})) == [
        "version of format:new unset → 1"
    ]
    assert told({"format": "a"}, {"format": "b"}, ({"convert": 1}, {"convert": 2})) == [
        "version of convert 1 → 2",
        "convert.format a → b",
    ]
    assert told({"sources": {}}, {"sources": {"a": {"weight": 2.0, "limit": None}}}) == ["convert.sources.a is new"]
    assert told({"roles": {}}, {"roles": {"x": "user"}}) == ["convert.roles.x unset → user"]
    assert told({"filter": "", "kept": 1}, {"filter": "a == 1", "kept": 1, "limit": None}) == [
        'convert.filter "" → a == 1'
    ]
    assert told({"kept": 1}, {"kept": 1, "limit": None}) == ["convert.limit is unset, and was not recorded before"]
    assert told({"kept": 1}, {"kept": 1}) == []
