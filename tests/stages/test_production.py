"""Production's ref: it moves only from what was seen, its log forgets no move, a rollback finds what stood before."""

import json
import multiprocessing
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import UserError
from stages.identity import Action, File, Tree
from stages.production import KEPT, Move, Name, Production, production, promote, rollback
from stages.store import Store, open_store


def named(model: int | str, stage: str = "merge") -> dict[str, str]:
    """The name of the artifact that `made` makes."""
    data = f"{stage} {model}".encode()
    tree = Tree((File("file", len(data), sha256(data).hexdigest()),))
    return {"key": action_of(model, stage).key, "digest": tree.digest}


def action_of(model: int | str, stage: str) -> Action:
    return Action(stage, {stage: 1}, {"model": f"{model}"}, {})


def made(store: Store, model: int | str, stage: str = "merge") -> dict[str, str]:
    """A model's weights in the store, or its card."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "file").write_text(f"{stage} {model}")
        artifact = store.commit(action_of(model, stage), Path(folder), {}, {})
    assert {"key": artifact.key, "digest": artifact.digest} == named(model, stage)
    return named(model, stage)


def put(store: Store, model: int | str, seen: Production | None, compared: Name | None = None) -> Move | None:
    weights, card = made(store, model), made(store, model, "publish")
    run = f"run-{model}"
    return promote(store, "bot", seen, model=weights, card=card, run=run, compared=compared, why="better")


def stands(store: Store) -> str:
    found = production(store, "bot")
    assert found is not None
    return found.now.run.removeprefix("run-")


def memory(folder: Path) -> Store:
    return open_store(f"memory://{uuid4().hex}", folder / "cache")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), tmp_path / "cache")


def test_it_moves_only_from_what_was_seen(store: Store) -> None:
    assert put(store, "a", None)
    first = production(store, "bot")
    assert put(store, "b", first)
    assert put(store, "c", first) is None
    assert put(store, "c", None) is None
    assert stands(store) == "b"


def test_a_rollback_goes_back_one_model_at_a_time(store: Store) -> None:
    for model in "abc":
        put(store, model, production(store, "bot"))
    assert [rollback(store, "bot").run for _ in range(2)] == ["run-b", "run-a"]
    with pytest.raises(UserError, match="no model stood in production before"):
        rollback(store, "bot")
    put(store, "d", production(store, "bot"))
    assert rollback(store, "bot").run == "run-a", "what stood before d, not c"


def test_nothing_to_go_back_to_is_said(store: Store) -> None:
    with pytest.raises(UserError, match="nothing was promoted yet"):
        rollback(store, "bot")


def test_a_model_is_compared_with_what_it_replaced_while_it_stands(store: Store) -> None:
    put(store, "a", None)
    seen = production(store, "bot")
    assert seen and seen.rival(named("b")["digest"]) == named("a")
    put(store, "b", seen, compared=named("a"))
    seen = production(store, "bot")
    assert seen and seen.rival(named("b")["digest"]) == named("a")
    assert seen.rival(named("c")["digest"]) == named("b")
    assert seen.stood(named("a")["digest"]) and not seen.stood(named("b")["digest"])


@settings(max_examples=40, deadline=None)
@given(moves=st.lists(st.sampled_from(["promote", "rollback"]), min_size=1, max_size=40))
def test_any_moves_leave_what_a_stack_would(moves: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    store = memory(tmp_path_factory.mktemp("moves"))
    stack: list[str] = []
    for number, move in enumerate(moves):
        if move == "promote":
            assert put(store, number, production(store, "bot"))
            stack.append(str(number))
        elif len(stack) > 1:
            try:
                rollback(store, "bot")
            except UserError as error:
                assert "older ones are not kept" in str(error) and len(moves) > KEPT
                return
            stack.pop()
        else:
            with pytest.raises(UserError):
                rollback(store, "bot")
        if stack:
            assert stands(store) == stack[-1]
    found = production(store, "bot")
    if found:
        assert [m.number for m in found.moves] == list(range(1, len(found.moves) + 1))


def test_old_moves_stay_in_the_log_and_let_go_of_their_models(store: Store) -> None:
    for model in range(KEPT + 5):
        put(store, model, production(store, "bot"))
    found = production(store, "bot")
    assert found is not None
    assert len(found.moves) == KEPT + 5
    assert found.stood(named(0)["digest"])
    ref = store.read_ref("bot/production")
    assert ref is not None
    text = json.dumps(ref.document)
    assert named(5)["digest"] in text and named(4)["digest"] not in text
    for left in range(KEPT - 1):
        assert rollback(store, "bot").run == f"run-{KEPT + 3 - left}"
    with pytest.raises(UserError, match="older ones are not kept"):
        rollback(store, "bot")


def _move_often(url: str, cache: Path, worker: int, queue: Any) -> None:
    """Promote and roll back as fast as it goes; tell which moves were confirmed."""
    store, confirmed = open_store(url, cache), []
    for turn in range(12):
        if turn % 4 == 3:
            try:
                move: Move | None = rollback(store, "bot", by=f"worker-{worker}")
            except UserError:
                move = None
        else:
            move = put(store, f"{worker}{turn:02}", production(store, "bot"))
        if move:
            confirmed.append((move.number, move.run))
    queue.put(confirmed)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_of_moves_at_once_none_is_lost(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path / "store") if kind == "folder" else request.getfixturevalue("s3").url
    store = open_store(url, tmp_path / "cache")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_move_often, args=(url, tmp_path / f"c{n}", n, queue)) for n in range(4)]
    for worker in workers:
        worker.start()
    confirmed = [move for _ in workers for move in queue.get(timeout=120)]
    for worker in workers:
        worker.join()
    found = production(store, "bot")
    assert found is not None
    assert len(confirmed) > 12
    # Every confirmed move is in the log, once and at its place, and nothing else is: nobody's promotion was lost.
    assert [(m.number, m.run or run) for m, (_, run) in zip(found.moves, sorted(confirmed), strict=True)] == sorted(
        confirmed
    )
