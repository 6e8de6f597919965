"""One Prefect server for the tests of flows, and a tiny recipe that really trains."""

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from flows.server import Api, own_server, reporting_to
from stages.runtime import Runtime
from tests.flows.raised import Raised, free_port
from tests.flows.victim import Victim

os.environ.setdefault("DO_NOT_TRACK", "1")


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory, prepared_home: Callable[[Path], Path]) -> Iterator[Api]:
    """A real server that lives as long as the session (one for each xdist worker); nothing reports to it by itself."""
    with own_server(prepared_home(tmp_path_factory.mktemp("prefect")), port=0) as api:
        yield api


def tiny_recipe(folder: Path, model: Path) -> dict[str, Any]:
    """A recipe over `model` and rows written to `folder`."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=4)) for _ in range(240)]
    for name, chosen in (("echo", words[:200]), ("heldout", words[200:])):
        turns = [[{"role": "user", "content": f"say {w}"}, {"role": "assistant", "content": w}] for w in chosen]
        rows = [{"messages": t, "question": t[0]["content"], "answer": t[1]["content"]} for t in turns]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "tiny",
        "fetch": {
            "model": {"path": str(model)},
            "data": {
                "echo": {"files": str(folder / "echo.jsonl")},
                "heldout": {"files": str(folder / "heldout.jsonl"), "split": "heldout"},
            },
        },
        "pack": {"sequence_length": 128, "global_batch": 4},
        "train": {"lora": {"rank": 2}, "learning_rate": 0.01},
        "evaluate": {"tasks": {"echo": {"source": "heldout", "max_new_tokens": 8}}},
        "publish": {"to": str(folder / "out"), "gate": {"require": "nothing"}},
    }


@dataclass(frozen=True)
class Tiny:
    """A recipe over a random two-layer model and a few hundred rows, with a store of its own."""

    recipe: dict[str, Any]
    runtime: Runtime
    api: Api
    folder: Path = field(repr=False)

    def run(self, *select: str, **changes: Any) -> UUID:
        """Run the flow to its end; return the flow run's id. Raises what the flow raises."""
        from flows.finetune import finetune
        from flows.recipe import Recipe

        recipe = Recipe.model_validate(self.recipe | {name: self.recipe[name] | v for name, v in changes.items()})
        with reporting_to(self.api):
            state = finetune(recipe, select=select, runtime=self.runtime, return_state=True)
        state.result()
        return UUID(str(state.state_details.flow_run_id))


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prefect_api: Api) -> Callable[[], Tiny]:
    """Makes a recipe with an empty store."""

    def make() -> Tiny:
        folder = tmp_path_factory.mktemp("tiny")
        recipe = tiny_recipe(folder, tiny_model)
        return Tiny(recipe, Runtime(store=str(folder / "store"), cache=folder / "cache"), prefect_api, folder)

    return make


@dataclass(frozen=True)
class Trained:
    """A recipe that ran twice as far as training: once to make everything, once to find it."""

    tiny: Tiny
    made: UUID
    found: UUID


@pytest.fixture(scope="session")
def trained(make_tiny: Callable[[], Tiny]) -> Trained:
    """The one real training of these tests."""
    tiny = make_tiny()
    return Trained(tiny, tiny.run("+train"), tiny.run("+train"))


@pytest.fixture(scope="session")
def raised(tmp_path_factory: pytest.TempPathFactory, prepared_home: Callable[[Path], Path]) -> Iterator[Raised]:
    """A `regrow up` of the session's own."""
    # Where `regrow` looks by itself when XDG_DATA_HOME is the folder `up`.
    raised = Raised(prepared_home(tmp_path_factory.mktemp("up") / "regrow" / "prefect"), free_port())
    try:
        raised.up()
        yield raised
    finally:
        raised.regrow("down", "--home", str(raised.home))


@pytest.fixture
def victim(raised: Raised, tmp_path: Path, tiny_model: Path) -> Victim:
    """A training on the workers of `regrow up`, to be hit while it goes on."""
    recipe = tiny_recipe(tmp_path, tiny_model)
    recipe["train"]["epochs"] = 12
    runtime = Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache", save_seconds=0.5, lease_seconds=15.0)
    return Victim(raised, recipe, runtime)
