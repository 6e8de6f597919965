"""A recipe whose models are made by hand: runs go through plan, evaluate, gate and refs as real ones do, in seconds.

The file `right` in a model's weights says how many of its 40 items it gets right; only publish runs for real.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from flows.execute import execute
from flows.plan import make_plan
from flows.recipe import Loaded, Recipe
from flows.run import Run, start
from flows.settle import Outcome, settle
from stages import evaluate
from stages.identity import Json
from stages.production import production
from stages.runtime import Runtime
from stages.stage import part_action
from stages.store import Store, open_store

ITEMS = 40

FACTS: dict[str, dict[str, Json]] = {
    "fetch": {"bytes": 4},
    "convert": {"rows": 1, "formats": {"chat": 1}, "dropped": {}},
    "tokenize": {"tokens": 12},
    "pack": {"bins": 1, "fill": 1.0, "trained_tokens": 6, "tokens": 12, "dropped": {}},
    "train": {"steps": 1, "first_loss": 2.0, "last_loss": 1.0, "tokens_per_second": 10.0, "resumed_at_step": 0},
    "merge": {},
}
"""What the stages would tell people."""


@dataclass
class Rehearsal:
    """One name's recipe with a store."""

    folder: Path
    url: str = ""
    name: str = "bot"
    continuing: bool = False
    """Whether the recipe goes on from production; its questions are a source of their own then."""
    shards: tuple[str, ...] = ("{}",)
    """The data: the text of each shard."""
    questions: str = "questions"
    """The rows of the questions' source."""
    measures: bool = True
    """Whether these are held out."""
    base: str = "base"
    """The bytes of the base model."""

    @cached_property
    def store(self) -> Store:
        return open_store(self.url or str(self.folder / "store"), self.folder / "cache")

    def start(self, right: int, **publish: Any) -> Run:
        """A run whose tuned model gets so many items right."""
        model = self.folder / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text("{}")
        (model / "tokenizer.json").write_text("{}")
        (model / "model.safetensors").write_text(self.base)
        rows = '{"question": "q", "answer": "t"}\n'
        (self.folder / "rows.jsonl").write_text(rows + "".join(self.shards[1:]))
        (self.folder / "questions.jsonl").write_text(rows)
        split = {"split": "heldout"} if self.measures else {}
        questions = {"questions": {"files": str(self.folder / "questions.jsonl"), **split}}
        asked = questions if self.continuing else {}
        recipe = {
            "name": self.name,
            "fetch": {
                "model": {"path": str(model)},
                "data": {"rows": {"files": str(self.folder / "rows.jsonl")}, **asked},
                "continuing": self.continuing,
            },
            "train": {"seed": right},
            "evaluate": {"tasks": {"spelling": {"source": next(iter(asked), "rows")}}, "heldout_loss": False},
            "publish": {"to": str(self.folder / "out"), **publish},
        }
        loaded = Loaded(recipe=Recipe.model_validate(recipe), text=yaml.safe_dump(recipe), path="")
        runtime = Runtime(store=self.store.url, cache=self.folder / "cache")
        return start(loaded, runtime, self.store)

    def make(self, run: Run, until: str = "") -> Run:
        """Everything up to the card, or up to a stage that is left to others."""
        if not until:
            run.record("started")
        data = {f"data/rows/{number}/rows.jsonl": text for number, text in enumerate(self.shards)}
        asked = {"data/questions/0/rows.jsonl": self.questions} if self.continuing else {}
        self._made(run, "fetch", {"model/model.safetensors": self.base, **data, **asked})
        right = run.loaded.recipe.train.seed
        for stage in ("convert", "tokenize", "pack", "train"):
            made_of = {name: tree.digest for name, tree in run.inputs(stage).items()} if stage == "convert" else ""
            self._made(run, stage, {"report.md": f"{stage} {right if stage == 'train' else made_of}"})
        self._made(run, "merge", {"right": str(right), "config.json": "{}"})
        inputs = run.inputs("evaluate")
        for part in evaluate.parts(run.loaded.recipe.evaluate, inputs):
            if run.store.find("evaluate", part_action(evaluate.STAGE, part).key) is None:
                assert not part.name.startswith("production/"), "production was scored when it was the tuned model"
                self._scored(run, part, right if part.name.startswith("tuned/") else 0)
        for stage in ("evaluate", "publish") if not until else ():
            execute(run, stage)
        return run

    def run(self, right: int, **publish: Any) -> tuple[Run, Outcome]:
        """A whole run."""
        run = self.make(self.start(right, **publish))
        outcome = settle(run)
        run.record("finished", asdict(outcome))
        run.become_baseline()
        return run, outcome

    def ready(self, right: int, **publish: Any) -> dict[str, Any]:
        """What a deployment is given, with everything up to the card made already."""
        run = self.make(self.start(right, **publish), until="evaluate")
        recipe = self.folder / f"{right}.yaml"
        recipe.write_text(run.loaded.text)
        return {"recipe": str(recipe), "runtime": {"store": self.store.url, "cache": str(run.runtime.cache)}}

    @property
    def stands(self) -> str:
        """The key of the weights in production."""
        found = production(self.store, self.name)
        return found.now.model["key"] if found else ""

    def to_run(self, right: int, **publish: Any) -> list[str]:
        """What the next run would make."""
        return make_plan(self.start(right, **publish)).to_run

    def scores(self, run: Run) -> Json:
        return run.artifacts["publish"].facts["scores"]["tasks"]["spelling"]

    def _made(self, run: Run, stage: str, files: dict[str, str]) -> None:
        action = run.action(stage)
        assert action is not None
        if found := run.store.find(stage, action.key):
            run.artifacts[stage] = found
            return
        run.artifacts[stage] = run.store.commit(action, self._folder(files), FACTS[stage], {})
        run.made.add(stage)

    def _scored(self, run: Run, part: Any, right: int) -> None:
        samples = [
            {"task": "", "item": i, "question": "q", "target": "t", "answer": "t" if i < right else "x"}
            | {"metric": "exact_match", "score": float(i < right)}
            for i in range(ITEMS)
        ]
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        files = {"samples.jsonl": lines, "scores.json": json.dumps({"tasks": {}})}
        run.store.commit(part_action(evaluate.STAGE, part), self._folder(files), {"items": ITEMS}, {})

    def _folder(self, files: dict[str, str]) -> Path:
        folder = self.folder / "making" / uuid4().hex
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder
