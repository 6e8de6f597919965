"""`regrow show`: what a run and an artifact are, where they come from; and what `plan` says with its options."""

import json
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from flows.plan import make_plan
from flows.screen import show_plan
from flows.show import show_what
from stages.errors import UserError
from stages.store import Store
from tests.flows.test_plan import CHAIN, Host, make_host, states

__all__ = ["make_host"]


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=80, highlight=False)


def shown(console: Console, store: Store, what: str | None, as_json: bool = False) -> str:
    with console.capture() as told:
        show_what(store, what, console, as_json)
    assert max(map(len, told.get().splitlines())) <= 80 or as_json
    return told.get()


def test_a_run_shows_its_stages_and_what_came_out(make_host: Callable[..., Host], console: Console) -> None:
    host = make_host()
    assert "no runs yet" in shown(console, host.start().store, None)
    run = host.run()
    assert run.id in shown(console, run.store, None)
    by_id, by_name = (shown(console, run.store, what) for what in (run.id, "chain"))
    assert by_id == by_name and f"run {run.id} of chain: finished on" in by_id
    for stage, said in zip(CHAIN, ("copied", "2 rows as messages", "tokens", "1 sequences"), strict=True):
        (line,) = (line for line in by_id.splitlines() if line.startswith(stage))
        assert all(each in line for each in ("made", run.artifacts[stage].key[:12], said)), line
    record = json.loads(shown(console, run.store, "chain", as_json=True))
    assert {name: each["key"] for name, each in record["stages"].items()} == {
        stage: run.artifacts[stage].key for stage in CHAIN
    }


def test_an_artifact_shows_facts_settings_inputs_lineage_and_files(
    make_host: Callable[..., Host], console: Console
) -> None:
    run = make_host().run()
    packed = run.artifacts["pack"]
    told = shown(console, run.store, packed.key[:10])
    assert told.startswith(f"pack {packed.key}")
    for wanted in ("sequence_length", "trained_tokens", "made by", run.id, "plan.json", "report.html"):
        assert wanted in told, wanted
    for stage in ("fetch", "convert", "tokenize"):
        assert run.artifacts[stage].key[:12] in told.partition("comes from")[2].partition("file")[0]
    document = json.loads(shown(console, run.store, f"pack/{packed.key}", as_json=True))
    assert document["facts"] == packed.facts and document["action"] == packed.action
    assert document["lineage"] == {
        stage: {"key": run.artifacts[stage].key, "digest": run.artifacts[stage].digest}
        for stage in ("fetch", "convert", "tokenize")
    }
    assert {(f["path"], f["sha256"]) for f in document["files"]} == {(f.path, f.sha256) for f in packed.tree.files}
    part = next(iter(run.artifacts["tokenize"].parts.values()))
    assert json.loads(shown(console, run.store, str(part["key"]), as_json=True))["lineage"] == {}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nobody", "no run is called so, and a key is at least 4"),
        ("abc", "at least 4 hexadecimal digits"),
        ("0000000000", "no artifact's key starts so"),
        ("../etc", "no run is called so"),
    ],
)
def test_what_is_not_there_is_said(make_host: Callable[..., Host], console: Console, what: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        shown(console, make_host().start().store, what)


def test_what_was_lost_is_said(make_host: Callable[..., Host], console: Console) -> None:
    run = make_host().run()
    packed = run.artifacts["pack"]
    run.store.objects.delete(f"actions/pack/{packed.key}.json")
    (line,) = (line for line in shown(console, run.store, "chain").splitlines() if line.startswith("pack"))
    assert "no longer in the store" in line


def test_force_makes_a_stage_again_and_those_below_may_follow(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host.run()
    plan = make_plan(host.start(), ("+pack",), force=("convert",))
    assert states(plan) == {"fetch": "cached", "convert": "runs", "tokenize": "unknown", "pack": "unknown"}
    assert plan.step("convert").reason == "forced"
    both = make_plan(host.start(), ("+pack",), force=("convert+",))
    assert both.step("tokenize").state == "runs" and both.step("tokenize").reason == "forced; depends on convert"


def test_why_says_who_made_what_is_cached(make_host: Callable[..., Host], console: Console) -> None:
    host = make_host()
    run = host.run()
    told = []
    for why in (False, True):
        with console.capture() as captured:
            show_plan(console, host.plan(), why)
        told.append(captured.get())
    assert f"made by run {run.id}" not in told[0]
    assert " ".join(told[1].split()).count(f"made by run {run.id}") == len(CHAIN)
