"""`regrow promote`, `rollback` and `history`: a person moves production, with the same command line as everybody's."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flows import cli, delivering, promotion
from flows import settle as settling
from flows.cli import app
from flows.delivering import place_of
from flows.history import events_of
from flows.local import Selection, finish
from flows.pages import history_page
from flows.promotion import promote, rollback
from flows.run import Run
from flows.settle import Answer, settle
from stages.deliver import deliver
from stages.errors import UserError
from stages.identity import Tree
from stages.objects import blob_path
from stages.production import Move, production
from stages.runtime import Runtime
from tests.flows.rehearsal import Rehearsal


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path)


def runtime(rehearsal: Rehearsal) -> Runtime:
    return Runtime(store=rehearsal.store.url, cache=rehearsal.folder / "cache")


def delivered(rehearsal: Rehearsal, to: str = "out") -> str:
    return str(json.loads((rehearsal.folder / to / "lineage.json").read_text())["run"])


def weights_of(run: Run) -> str:
    """The blob that stands for the model's weights."""
    [found] = [file.sha256 for file in run.artifacts["merge"].tree.files if file.path == "right"]
    return found


def regrow(rehearsal: Rehearsal, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--store", rehearsal.store.url], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_there_and_back_with_the_delivered_folder(rehearsal: Rehearsal) -> None:
    first, _ = rehearsal.run(10)
    second, _ = rehearsal.run(20)
    assert delivered(rehearsal) == second.id
    assert first.artifacts["merge"].key[:8] in regrow(rehearsal, "rollback", "bot")
    assert delivered(rehearsal) == first.id
    assert second.artifacts["merge"].key[:8] in regrow(rehearsal, "promote", "bot", second.id)
    assert delivered(rehearsal) == second.id
    told = json.loads(regrow(rehearsal, "history", "bot", "--json"))
    assert told["production"]["run"] == second.id
    assert [event["what"] for event in told["events"]] == ["promoted", "rolled back", "promoted", "promoted"]
    assert told["production"]["compared"]["key"] == first.artifacts["merge"].key
    assert rehearsal.to_run(20) == [], "what a person promoted is compared with what it was compared with before"


def test_a_model_that_did_not_pass_needs_to_be_asked_for(rehearsal: Rehearsal) -> None:
    good, _ = rehearsal.run(30)
    worse, _ = rehearsal.run(10)
    with pytest.raises(UserError, match=r"clearly worse than the model in production.*--anyway"):
        promote(rehearsal.store, runtime(rehearsal), "bot", worse.id)
    move = promote(rehearsal.store, runtime(rehearsal), "bot", worse.artifacts["publish"].key[:8], anyway=True)
    assert "although the gate was not passed" in move.why
    assert rollback(rehearsal.store, runtime(rehearsal), "bot").run == good.id


@pytest.mark.parametrize("first", [10, None], ids=["a model stood", "none stood"])
def test_a_model_that_was_not_compared_with_the_one_that_stands_needs_to_be_asked_for(
    first: int | None, rehearsal: Rehearsal
) -> None:
    if first:
        rehearsal.run(first)
    worse, _ = rehearsal.run(20, approval=True)
    better, _ = rehearsal.run(35, approval=True)
    promote(rehearsal.store, runtime(rehearsal), "bot", better.id)
    with pytest.raises(UserError, match=rf"of run {better.id}, so nothing says .*--anyway"):
        promote(rehearsal.store, runtime(rehearsal), "bot", worse.id)
    move = promote(rehearsal.store, runtime(rehearsal), "bot", worse.id, anyway=True)
    assert "although its gate compared with" in move.why
    assert promote(rehearsal.store, runtime(rehearsal), "bot", better.id).run == better.id, "it stood before"


def test_what_cannot_be_promoted_is_said(rehearsal: Rehearsal) -> None:
    with pytest.raises(UserError, match="no run of it made a card"):
        promote(rehearsal.store, runtime(rehearsal), "bot")
    run, _ = rehearsal.run(10)
    with pytest.raises(UserError, match="already names this model"):
        promote(rehearsal.store, runtime(rehearsal), "bot")
    with pytest.raises(UserError, match="no run with a card is called 'nobody'"):
        promote(rehearsal.store, runtime(rehearsal), "bot", "nobody")
    rehearsal.run(20)
    rehearsal.store.objects.delete(blob_path(weights_of(run)))
    with pytest.raises(UserError, match=r"no longer in .*run its recipe again"):
        promote(rehearsal.store, runtime(rehearsal), "bot", run.id)


@pytest.mark.parametrize(
    ("lost", "says"), [("record", r"no longer on record in .*regrow promote bot RUN"), ("weights", "is no longer in")]
)
def test_what_cannot_be_delivered_any_more_is_not_gone_back_to(rehearsal: Rehearsal, lost: str, says: str) -> None:
    first, _ = rehearsal.run(10)
    second, _ = rehearsal.run(20)
    path = f"runs/{first.id}.json" if lost == "record" else blob_path(weights_of(first))
    rehearsal.store.objects.delete(path)
    with pytest.raises(UserError, match=says):
        rollback(rehearsal.store, runtime(rehearsal), "bot")
    standing = production(rehearsal.store, "bot")
    assert standing and standing.now.run == second.id == delivered(rehearsal)


def test_what_could_not_be_delivered_is_delivered_by_the_command_that_the_error_names(rehearsal: Rehearsal) -> None:
    rehearsal.run(30)
    worse, _ = rehearsal.run(10)
    in_the_way = rehearsal.folder / "out" / "mine.txt"
    in_the_way.write_text("written by somebody")
    with pytest.raises(UserError, match=r"mine\.txt came in") as refused:
        promote(rehearsal.store, runtime(rehearsal), "bot", worse.id, anyway=True)
    standing = production(rehearsal.store, "bot")
    assert standing and standing.now.run == worse.id != delivered(rehearsal)
    [note] = refused.value.__notes__
    in_the_way.unlink()
    said = regrow(rehearsal, *note.rpartition("regrow ")[2].split())
    assert f"of run {worse.id}" in said and delivered(rehearsal) == worse.id
    assert production(rehearsal.store, "bot") == standing, "it moved once"
    with pytest.raises(UserError, match="already names this model"):
        promote(rehearsal.store, runtime(rehearsal), "bot", worse.id, anyway=True)


def test_what_could_not_be_delivered_is_delivered_by_the_next_run_whatever_its_gate_says(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    in_the_way = rehearsal.folder / "out" / "mine.txt"
    in_the_way.write_text("written by somebody")
    with pytest.raises(UserError, match=r"mine\.txt came in"):
        rehearsal.run(30)
    in_the_way.unlink()
    _, outcome = rehearsal.run(20)
    standing = production(rehearsal.store, "bot")
    assert outcome.production == "untouched" and standing and standing.now.run == delivered(rehearsal)


def test_a_failed_gate_is_told_also_where_productions_place_is_in_trouble(
    rehearsal: Rehearsal, caplog: pytest.LogCaptureFixture
) -> None:
    rehearsal.run(30)
    (rehearsal.folder / "out/README.md").write_text("edited")
    run, outcome = rehearsal.run(10)
    assert not outcome.passed and outcome.production == "untouched"
    [told] = [record.getMessage() for record in caplog.records if record.name == "flows.settle"]
    assert "bot/production names could not be delivered" in told and "README.md came in or changed" in told
    assert [event.what for event in events_of(rehearsal.store, "bot") if event.run == run.id] == ["gate failed"]


def test_a_run_that_fails_its_gate_puts_no_older_card_in_the_place_of_a_newer_one(rehearsal: Rehearsal) -> None:
    """The same model may have got a licence meanwhile, or other scores."""
    rehearsal.run(20)
    newer, outcome = rehearsal.run(20, license="mit")
    assert (outcome.production, outcome.arrived) == ("stands", True)
    _, outcome = rehearsal.run(10)
    assert outcome.production == "untouched" and delivered(rehearsal) == newer.id
    assert "license: mit" in (rehearsal.folder / "out/README.md").read_text()


def test_a_damaged_blob_that_is_met_while_delivering_is_one_line(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = rehearsal.run(10)
    rehearsal.run(20)
    blob = rehearsal.folder / "store" / blob_path(weights_of(first))
    blob.chmod(0o600)
    blob.write_text("99")
    monkeypatch.setattr(sys, "argv", ["regrow", "rollback", "bot", "--store", rehearsal.store.url])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error, note = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert error.startswith("error: the store is damaged: blob ") and "holds other bytes" in error
    assert note == f"bot/production names it; deliver it with: regrow promote bot {first.id}"


def test_a_recipe_that_asks_for_approval_waits_for_a_person(rehearsal: Rehearsal) -> None:
    run, outcome = rehearsal.run(10, approval=True)
    assert outcome.production == "waits" and production(rehearsal.store, "bot") is None
    assert not (rehearsal.folder / "out").exists()
    assert rehearsal.run(10, approval=True)[1].production == "waits"
    promote(rehearsal.store, runtime(rehearsal), "bot")
    assert delivered(rehearsal) in (run.id, rehearsal.run(10, approval=True)[0].id)
    assert rehearsal.run(10, approval=True)[1].production == "stands"


def test_a_no_leaves_production_alone_and_is_in_the_history_with_who_said_it_and_why(rehearsal: Rehearsal) -> None:
    good, _ = rehearsal.run(10)
    run, outcome = rehearsal.run(20, approval=True)
    assert outcome.production == "waits"
    outcome = settle(run, Answer(False, "answers are too terse", "ada"))
    run.record("finished", asdict(outcome))
    assert outcome.production == "refused" and outcome.told("bot") == "ada said no; bot/production was left alone"
    standing = production(rehearsal.store, "bot")
    assert standing and standing.now.run == good.id == delivered(rehearsal)
    events = events_of(rehearsal.store, "bot")
    [declined] = [event for event in events if event.what == "declined"]
    assert (declined.run, declined.by) == (run.id, "ada") and declined.why.endswith("; answers are too terse")
    page = history_page("bot", events, standing.now)
    assert "| declined by ada |" in page and f"names `{good.artifacts['merge'].key[:8]}` of run [{good.id}](" in page
    assert "declined" in regrow(rehearsal, "history", "bot")
    assert promote(rehearsal.store, runtime(rehearsal), "bot", run.id).run == run.id, "it is not lost"


def found_made(rehearsal: Rehearsal, right: int) -> Run:
    """`regrow run` where every stage is in the store."""
    run = rehearsal.start(right)
    finish(run, Selection(), "", Console(quiet=True), False)
    return run


def test_a_run_that_promotes_what_it_found_made_can_be_gone_back_to(rehearsal: Rehearsal) -> None:
    _, outcome = rehearsal.run(20, approval=True)
    assert outcome.production == "waits"
    run = found_made(rehearsal, 20)
    record = rehearsal.store.read_run(run.id)
    assert record and (record["status"], record["outcome"]["production"]) == ("finished", "moved")
    told = events_of(rehearsal.store, "bot")
    assert sorted((event.what, event.scores["spelling"]["value"]) for event in told) == [
        ("promoted", 0.5),
        ("waits for a yes", 0.5),
    ]
    rehearsal.run(30)
    assert rollback(rehearsal.store, runtime(rehearsal), "bot").run == run.id
    assert found_made(rehearsal, 20).id not in dict(rehearsal.store.runs()), "what moved nothing has no record"


def test_a_run_that_could_not_deliver_what_it_found_made_says_so_in_its_record(rehearsal: Rehearsal) -> None:
    rehearsal.run(20, approval=True)
    (rehearsal.folder / "out").write_text("in the way")
    with pytest.raises(UserError, match="is no folder"):
        found_made(rehearsal, 20)
    standing = production(rehearsal.store, "bot")
    record = rehearsal.store.read_run(standing.now.run) if standing else None
    assert record and record["status"] == "failed" and "is no folder" in record["reason"]


def test_a_yes_to_what_was_compared_with_a_model_that_is_gone_moves_nothing(rehearsal: Rehearsal) -> None:
    rehearsal.run(10)
    waiting, _ = rehearsal.run(20, approval=True)
    other, _ = rehearsal.run(30)
    assert settle(waiting, Answer(True, "", "ada")).production == "elsewhere"
    assert delivered(rehearsal) == other.id


def test_the_history_shows_runs_that_moved_nothing(rehearsal: Rehearsal) -> None:
    rehearsal.run(30)
    rehearsal.run(10)
    rehearsal.start(20).record("failed")
    events = events_of(rehearsal.store, "bot")
    assert sorted(event.what for event in events) == ["failed", "gate failed", "promoted"]
    [failed] = [event for event in events if event.what == "gate failed"]
    assert "clearly worse" in failed.why and failed.scores["spelling"]["value"] == 0.25
    shown = regrow(rehearsal, "history", "bot")
    assert "gate failed" in shown and "75.0" in shown
    assert max(len(line) for line in shown.splitlines() if not line.startswith("latest")) <= 80
    with pytest.raises(UserError, match="no run is called nobody"):
        events_of(rehearsal.store, "nobody")


@pytest.mark.full
def test_a_run_stands_once_in_the_history_however_long_that_is(rehearsal: Rehearsal) -> None:
    for right in range(10, 24):
        rehearsal.run(right)
    events = events_of(rehearsal.store, "bot")
    assert [event.what for event in events] == ["promoted"] * 14
    assert len({event.model for event in events}) == 14


def test_a_rollback_reaches_the_place_of_the_model_that_it_replaces(rehearsal: Rehearsal) -> None:
    first, _ = rehearsal.run(10)
    rehearsal.run(20, to=str(rehearsal.folder / "elsewhere"))
    rollback(rehearsal.store, runtime(rehearsal), "bot")
    assert delivered(rehearsal, "elsewhere") == first.id == delivered(rehearsal)


@pytest.mark.parametrize("blocked", ["out", "elsewhere"])
@pytest.mark.parametrize("mended_by", ["the command", "the next run"])
def test_a_rollback_reaches_one_place_where_the_other_cannot_be_written(
    blocked: str, mended_by: str, rehearsal: Rehearsal
) -> None:
    first, _ = rehearsal.run(10)
    rehearsal.run(20, to=str(rehearsal.folder / "elsewhere"))
    (rehearsal.folder / blocked / "README.md").write_text("written by somebody")
    with pytest.raises(UserError, match=r"README\.md came in") as refused:
        rollback(rehearsal.store, runtime(rehearsal), "bot")
    assert delivered(rehearsal, "elsewhere" if blocked == "out" else "out") == first.id
    shutil.rmtree(rehearsal.folder / blocked)
    if mended_by == "the command":
        [note] = refused.value.__notes__
        said = regrow(rehearsal, *note.rpartition("regrow ")[2].split())
        assert all(f"model      {rehearsal.folder / place}" in said for place in ("out", "elsewhere"))
    else:
        assert rehearsal.run(5, to=str(rehearsal.folder / blocked))[1].production == "untouched"
    assert delivered(rehearsal, blocked) == first.id


def test_two_rollbacks_reach_every_place_of_the_models_that_they_take_away(rehearsal: Rehearsal) -> None:
    first, *_ = [rehearsal.run(right, to=str(rehearsal.folder / str(right)))[0] for right in (10, 20, 30)]
    for _ in range(2):
        rollback(rehearsal.store, runtime(rehearsal), "bot")
    assert [delivered(rehearsal, to) for to in ("10", "20", "30")] == [first.id] * 3


def test_a_rollback_from_another_folder_reaches_the_folder_of_the_run(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("project", "home"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "project")
    first, outcome = rehearsal.run(10, to="out/bot")
    assert outcome.to == str(tmp_path / "project/out/bot")
    waiting, _ = rehearsal.run(20, to="out/bot/", approval=True)
    monkeypatch.chdir(tmp_path / "home")
    said = regrow(rehearsal, "promote", "bot")
    assert f"model      {tmp_path / 'project/out/bot'}" in said.splitlines()
    assert delivered(rehearsal, "project/out/bot") == waiting.id
    rollback(rehearsal.store, runtime(rehearsal), "bot")
    assert delivered(rehearsal, "project/out/bot") == first.id
    assert not any((tmp_path / "home").iterdir())
    assert len([*(tmp_path / "store/locks/deliver").iterdir()]) == 1, "one place, one turn at a time"


def test_a_record_that_does_not_say_where_its_recipes_folder_lay_goes_on_as_before(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    first, _ = rehearsal.run(10, to="served")
    rehearsal.run(20, to="served")
    for name, record in list(rehearsal.store.runs()):
        del record["to"]
        rehearsal.store.write_run(name, record)
    rollback(rehearsal.store, runtime(rehearsal), "bot")
    assert delivered(rehearsal, "served") == first.id


@pytest.mark.parametrize("private", ["false", "true", False])
def test_a_repository_is_as_private_for_a_person_as_for_a_run(private: object, rehearsal: Rehearsal) -> None:
    run, _ = rehearsal.run(10, to="hf://org/mine", private=private, approval=True)
    record = rehearsal.store.read_run(run.id)
    assert record and place_of(record).private is run.loaded.recipe.publish.private


def test_a_repository_of_whose_privacy_a_record_says_nothing_is_private() -> None:
    """Recipes could say `private: null` once."""
    for said in ("{}", "{to: hf://org/mine}", "{to: hf://org/mine, private: null}"):
        assert place_of({"text": f"publish: {said}", "to": "hf://org/mine"}).private is True


def test_digits_of_several_models_name_none(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal.run(10)
    rehearsal.run(20)
    monkeypatch.setattr(promotion, "DIGITS", 0)
    with pytest.raises(UserError, match="the keys of 2 models start with"):
        promote(rehearsal.store, runtime(rehearsal), "bot", "")


def test_a_rollback_while_a_run_delivers_has_the_last_word(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = rehearsal.run(10)
    begun, goes_on = Event(), Event()

    def slowly(to: str, tree: Tree, *given: Any, **options: Any) -> None:
        if not begun.is_set():
            begun.set()
            assert goes_on.wait(60)
        deliver(to, tree, *given, **options)

    monkeypatch.setattr(delivering, "deliver", slowly)
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(rehearsal.run, 20)
        assert begun.wait(60)
        back = pool.submit(rollback, rehearsal.store, runtime(rehearsal), "bot")
        eventually_names(rehearsal, first)
        goes_on.set()
        assert back.result(60).run == first.id and second.result(60)
    assert delivered(rehearsal) == first.id


def test_a_run_whose_model_was_taken_back_before_it_delivers_leaves_the_place_alone(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = rehearsal.run(10)
    promoted = settling.promote

    def and_back(*given: Any, **named: Any) -> Move | None:
        move = promoted(*given, **named)
        rollback(rehearsal.store, runtime(rehearsal), "bot")
        return move

    monkeypatch.setattr(settling, "promote", and_back)
    _, outcome = rehearsal.run(20)
    assert (outcome.production, outcome.to, outcome.arrived) == ("elsewhere", "", False)
    assert delivered(rehearsal) == first.id


def test_a_run_that_lost_its_turn_while_it_delivered_leaves_the_place_to_the_rollback(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store was away for longer than a lease lives, and the destination was not."""
    to = f"file://{rehearsal.folder / 'bucket'}"
    first, _ = rehearsal.run(10, to=to)
    second = rehearsal.make(rehearsal.start(20, to=to))

    def slowly(to: str, tree: Tree, *given: Any, go_on: Callable[[], None], **options: Any) -> None:
        [path] = [entry.path for entry in rehearsal.store.objects.list("locks/deliver/")]
        taken = {"owner": "another", "seconds": 1.0, "token": "another's", "released": True, "process": []}
        rehearsal.store.objects.put(path, json.dumps(taken).encode())
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(back).result(60).run == first.id
        deliver(to, tree, *given, go_on=lambda: eventually_lost(go_on), **options)

    def back() -> Move:
        with monkeypatch.context() as patch:
            patch.setattr(delivering, "deliver", deliver)
            return rollback(rehearsal.store, runtime(rehearsal), "bot")

    monkeypatch.setattr(delivering, "deliver", slowly)
    second.runtime = Runtime(**{**second.runtime.model_dump(), "lease_seconds": 0.5})
    with pytest.raises(UserError, match=r"stopped before all was delivered.*another run took it over"):
        settle(second)
    assert delivered(rehearsal, "bucket") == first.id


def eventually_lost(go_on: Callable[[], None]) -> None:
    for _ in range(600):
        go_on()
        time.sleep(0.1)
    raise AssertionError("the lease was not lost")


def eventually_names(rehearsal: Rehearsal, run: Run) -> None:
    for _ in range(600):
        if rehearsal.stands == run.artifacts["merge"].key:
            return
        time.sleep(0.1)
    raise AssertionError("production was not moved back")
