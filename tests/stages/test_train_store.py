"""A training whose machine is gone: another machine goes on from what the store holds, to the same bits."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.build import Built, build
from stages.identity import Action, Tree, tree_of
from stages.jobs import Hooks
from stages.runtime import Runtime
from stages.store import Store, open_store
from stages.train import STAGE, TrainConfig
from tests.stages import tiny

CONFIG = TrainConfig.model_validate({"epochs": 2, "learning_rate": 1e-2, "lora": {"dropout": 0.1}})

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.stages.test_train_store import machine

when, folder = sys.argv[1], Path(sys.argv[2])

def die(event, arguments):
    # A real death of the whole machine while a file of the second checkpoint is copied to the store.
    here = " ".join(str(a) for a in arguments[:2])
    if when == "uploading" and event == "os.rename" and "/0000000002/files/optimizer" in here:
        os.kill(os.getpid(), signal.SIGKILL)
    if when == "uploaded" and event == "os.link" and "/0000000002/complete.json" in here:
        sys.addaudithook(lambda event, arguments: os.kill(os.getpid(), signal.SIGKILL) if event == "open" else None)

sys.addaudithook(die)
machine(folder, "first", save_seconds=1e-9)
"""


def inputs(store: Store, folder: Path) -> dict[str, Tree]:
    made = {"model": tiny.llama(folder / "model"), **tiny.plan(folder, tiny.documents(30))}
    trees = {}
    for name, path in made.items():
        tree = tree_of(path)
        trees[name] = store.commit(Action(name, {name: 1}, {"digest": tree.digest}, {}), path, {}, {}).tree
    return trees


def machine(folder: Path, name: str, hooks: Hooks | None = None, **runtime: Any) -> tuple[Built, Store]:
    """Train on a machine of that name: a cache of its own over a shared store."""
    cache = folder / name
    cache.mkdir(exist_ok=True)
    settings = Runtime.model_validate(
        {"store": str(folder / "store"), "cache": cache, "device": "cpu", "lease_seconds": 2, **runtime}
    )
    store = open_store(settings.store, settings.cache)
    return build(STAGE, CONFIG, inputs(store, folder / "inputs"), store, settings, hooks=hooks), store


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return machine(tmp_path_factory.mktemp("unbroken"), "only")[0]


@pytest.mark.full
@pytest.mark.parametrize("when", ["uploaded", "uploading"])
def test_another_machine_goes_on_where_one_was_lost(tmp_path: Path, unbroken: Built, when: str) -> None:
    died = subprocess.run([sys.executable, "-c", KILLED, when, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert died.returncode == -signal.SIGKILL
    shutil.rmtree(tmp_path / "first")
    built, store = machine(tmp_path, "second")
    assert built.artifact.facts["resumed_at_step"] == (2 if when == "uploaded" else 1)
    assert built.artifact.tree == unbroken.artifact.tree
    assert not list(store.objects.list("checkpoints/"))


@pytest.mark.full
def test_a_store_that_takes_no_checkpoints_costs_the_copies_alone(tmp_path: Path, unbroken: Built) -> None:
    notes: list[str] = []
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "checkpoints").write_text("in the way")
    built, _ = machine(tmp_path, "only", Hooks(on_wait=notes.append), save_seconds=1e-9)
    assert built.artifact.tree == unbroken.artifact.tree
    assert any("is on this machine only, it was not copied to the store" in note for note in notes)
