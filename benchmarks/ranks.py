"""Speed of one training on one, two or more GPUs of a machine, as the train stage starts its ranks.

    python -m benchmarks.ranks 8b lora --ranks 1 2 --shards none fsdp --set micro_batch=2

A random model is written to a folder, for ranks are processes of their own that read one; every cell trains on the same
sequences in the same steps. Prints tokens a second over all ranks, from when step `--warm` was told to when the last
but one was; each rank's peak memory; the losses, which should agree.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import train_input


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("method", choices=["full", "lora"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shards", nargs="+", default=["none"])
    parser.add_argument("--set", nargs="*", default=[], help="train.KEY=VALUE of the recipe, KEY=VALUE of the runtime")
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()

    config: dict[str, Any] = {"method": given.method, "max_steps": given.steps}
    runtime: dict[str, Any] = {"save_seconds": 1e9, "trackers": (), "device": given.device}
    for setting in given.set:
        name, _, value = setting.partition("=")
        target = config if name.startswith("train.") else runtime
        target[name.removeprefix("train.")] = yaml.safe_load(value)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_input.model(given.shape, given.device).save_pretrained(folder / "model")
        tokens = (given.steps + 1) * given.global_batch * given.sequence
        inputs = train_input.plan(folder, given.shape, tokens, given.sequence, given.global_batch, share=0.5)
        for ranks in given.ranks:
            for shard in given.shards if ranks > 1 else ["none"]:
                settings = {**runtime, "ranks": ranks, "shard": shard}
                measure(given, config, settings, {"model": folder / "model", **inputs}, folder / f"{ranks}-{shard}")


def measure(
    given: argparse.Namespace, config: dict[str, Any], runtime: dict[str, Any], inputs: dict[str, Path], folder: Path
) -> None:
    """Train once, and say how it went."""
    import torch

    from stages.errors import UserError
    from stages.runtime import Runtime
    from stages.stage import Work
    from stages.train import TrainConfig
    from stages.train.supervise import train

    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what was made here before is in the way of the first rank
    told: dict[int, float] = {}

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if unit == "steps":
            told[int(done)] = time.perf_counter()
            print(f"{cell}: step {done} after {told[int(done)] - begun:.1f} s", file=sys.stderr, flush=True)

    cell = f"RANKS {given.shape} {given.method} {' '.join(given.set)} {runtime['ranks']} {runtime['shard']}"
    (folder / "out").mkdir(parents=True)
    work = Work(folder / "work", Runtime.model_validate(runtime), tell=tell)
    begun = time.perf_counter()
    try:
        facts = train(TrainConfig.model_validate(config), inputs, folder / "out", work)
    except UserError as error:
        print(f"{cell}: {error}", flush=True)
        return
    took = time.perf_counter() - begun
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    first = min(step for step in told if step >= given.warm)
    last = max(told) - 1  # what a step gave arrives a step later, but for the last one's
    tokens = sum(line["tokens"] for line in lines if first < line["step"] <= last)
    losses = " ".join(f"{lines[at]['loss']:.4f}" for at in (0, len(lines) // 2, -1))
    print(
        f"{cell}: {tokens / max(told[last] - told[first], 1e-9):,.0f} tok/s over steps {first + 1} to {last}, "
        f"peak {facts.get('peak_memory_bytes', 0) / 2**30:.1f} GiB a rank, "
        f"losses {losses}, {took:.0f} s in all, {facts['seconds_to_prepare']:.0f} to prepare, "
        f"{facts['speed']} {facts.get('notes', '')}",
        flush=True,
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
