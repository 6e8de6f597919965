"""Golden digests: the bytes of every stage that must repeat, on fixtures. A change without a version bump is a bug.

When bytes change on purpose, bump the stage's or plug-in's version and run
`UPDATE_GOLDEN=1 python -m pytest tests/golden`.
"""

import json
import os
from pathlib import Path

import pytest

from flows.graph import WIRING, stage_named
from stages.build import Built, build
from stages.identity import Tree
from stages.runtime import Runtime
from stages.stage import version_of
from stages.store import open_store

GOLDEN = Path(__file__).parent / "digests.json"
MODEL = Path(__file__).parent / "model"
ROWS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Größe? <|im_end|> 你好"},
            {"role": "assistant", "content": "1 m", "train": True},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "ok"},
        ]
    },
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "completion": {"text": "Once upon a time."},
    "prompt_completion": {"prompt": "Größe?", "completion": "1 m"},
    "input_output": {"segments": [{"text": "Hi.<|im_end|>", "label": False}, {"text": " Hello.", "label": True}]},
    "pretokenized": {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
}
CHAIN = ("fetch", "convert", "tokenize", "pack")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    folder = tmp_path_factory.mktemp("golden")
    for name, row in ROWS.items():
        copies = [json.dumps(row | {"n": n}, ensure_ascii=False) for n in range(3)]
        (folder / f"{name}.jsonl").write_text("\n".join(copies) + "\n")
    recipe = {
        "fetch": {"model": {"path": str(MODEL)}, "data": {n: {"files": str(folder / f"{n}.jsonl")} for n in ROWS}},
        "convert": {"sources": {name: {"format": name} for name in ROWS}},
        "tokenize": {},
        "pack": {"sequence_length": 256, "global_batch": 2, "deduplicate": False},
    }
    runtime = Runtime(store=str(folder / "store"), cache=folder / "cache")
    store = open_store(runtime.store, runtime.cache)
    made: dict[str, Built] = {}
    for name in CHAIN:
        stage = stage_named(name)
        inputs: dict[str, Tree] = {n: t.select(made[t.stage].artifact.tree) for n, t in WIRING[name].items()}
        made[name] = build(stage, stage.config.model_validate(recipe[name]), inputs, store, runtime)
    return made


@pytest.mark.parametrize("name", CHAIN)
def test_the_bytes_are_those_of_this_version(
    name: str, built: dict[str, Built], request: pytest.FixtureRequest
) -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    artifact = built[name].artifact
    now = {"version": artifact.action["version"], "digest": artifact.digest}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {name: now}, indent=1, sort_keys=True) + "\n")
        return
    assert now == golden[name], f"{name} gives other bytes: bump its version (or undo), then UPDATE_GOLDEN=1"


def test_versions_are_what_the_declarations_say(built: dict[str, Built]) -> None:
    stage = stage_named("pack")
    assert built["pack"].artifact.action["version"] == version_of(stage, stage.config())
