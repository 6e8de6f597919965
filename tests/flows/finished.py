"""A tiny recipe whose model was trained, merged, promoted and delivered, without a server or an evaluation: for what is
done with a finished model."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import yaml

from flows.execute import execute
from flows.recipe import load
from flows.run import Run, start
from flows.settle import named
from stages.deliver import deliver
from stages.identity import Action
from stages.production import promote
from stages.runtime import Runtime
from stages.store import Store, open_store

NAME = "parrot"


@dataclass(frozen=True)
class Finished:
    """Its recipe's file, its store, and the run that made everything."""

    folder: Path
    recipe: Path
    store: Store
    run: Run

    @property
    def options(self) -> list[str]:
        """What the command needs to look there."""
        return ["--store", self.store.url, "--runtime", str(self.folder / "runtime.yaml")]


def finish(folder: Path, model: Path) -> Finished:
    """Train `model` to say what it is told to; let the result stand in production."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=4)) for _ in range(120)]
    for name, chosen in (("echo", words[:100]), ("heldout", words[100:])):
        turns = [[{"role": "user", "content": f"say {w}"}, {"role": "assistant", "content": w}] for w in chosen]
        rows = [{"messages": t, "question": t[0]["content"], "answer": t[1]["content"]} for t in turns]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "name": NAME,
        "fetch": {
            "model": {"path": str(model)},
            "data": {
                "echo": {"files": str(folder / "echo.jsonl")},
                "heldout": {"files": str(folder / "heldout.jsonl"), "split": "heldout"},
            },
        },
        "pack": {"sequence_length": 128, "global_batch": 4},
        "train": {"lora": {"rank": 2}, "learning_rate": 0.01, "epochs": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    runtime = Runtime(store=str(folder / "store"), cache=folder / "cache", device="cpu")
    (folder / "runtime.yaml").write_text(yaml.safe_dump({"cache": str(folder / "cache"), "device": "cpu"}))
    store = open_store(runtime.store, runtime.cache)
    run = start(load(folder / "recipe.yaml", ()), runtime, store)
    run.record("running")
    for stage in ("fetch", "convert", "tokenize", "pack", "train", "merge"):
        execute(run, stage)
    run.record("done")
    run.become_baseline()
    merged = run.artifacts["merge"]
    (folder / "card").mkdir()
    card = store.commit(Action("publish", {"publish": 1}, {}, {}), folder / "card", {}, {})
    promote(store, NAME, None, model=named(merged), card=named(card), run=run.id, compared=None, why="it is a test")
    deliver(str(folder / "out"), merged.tree, store, run.name)
    lineage = {"stages": {stage: named(artifact) for stage, artifact in run.artifacts.items()}}
    (folder / "out" / "lineage.json").write_text(json.dumps(lineage))
    return Finished(folder, folder / "recipe.yaml", store, run)
