"""Speed of the train stage as a recipe starts it, on a random model: `python -m benchmarks.train_ours 8b lora`.

    python -m benchmarks.train_ours 1b full --set train.optimizer=adamw_16bit micro_batch=2 --share 0.5

Only the model's weights do not come from a file. Prints tokens a second from the start of step `--warm` to that of the
last, by the device's own clock; peak memory; the share of `--ceiling` that the model's operations reach.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import train_input
from stages.runtime import Runtime
from stages.stage import Work

PROFILE = 0
"""The step after which one step is profiled."""


class Watch:
    """Remembers when each step ended."""

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}
        self.profiler: Any = None
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Called at the start of every step: its place on the device's own clock (figures of steps arrive late)."""
        import torch

        if torch.cuda.is_available():
            if PROFILE and len(self.marks) in (PROFILE, PROFILE + 1):
                self.profile()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self, first: int) -> list[float]:
        """Of each step from `first` (counted from 0) to the last but one."""
        return [
            float(end - begin) if isinstance(begin, float) else begin.elapsed_time(end) / 1000
            for begin, end in itertools.pairwise(self.marks[first:])
        ]

    def __call__(self, done: int, total: int, unit: str = "", **metrics: Any) -> None:
        self.ends[done] = time.perf_counter()

    def profile(self) -> None:
        """Begin, or end and show."""
        import torch

        torch.cuda.synchronize()
        if self.profiler is None:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()
        else:
            self.profiler.__exit__(None, None, None)
            show(self.profiler)


def show(profiler: Any) -> None:
    """Kernels by the time they take in one step."""
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    total = sum(e.self_device_time_total for e in events)
    print(f"profile: kernels {total / 1000:.1f} ms a step")
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:40]:
        print(f"  {event.self_device_time_total / 1000:8.2f} ms {event.count:6d} x {event.key[:150]}", flush=True)


def operations(shape: str, method: str, share: float) -> float:
    """Floating-point operations a token in the matrix products, without attention and adapters."""
    s = train_input.SHAPES[shape]
    heads = s["head_dim"] * (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"])
    layers = s["num_hidden_layers"] * s["hidden_size"] * (heads + 3 * s["intermediate_size"])
    return (6 if method == "full" else 4) * (layers + share * s["vocab_size"] * s["hidden_size"])


def main() -> None:
    global PROFILE
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("method", choices=["full", "lora"])
    parser.add_argument("--set", nargs="*", default=[], help="train.KEY=VALUE of the recipe, KEY=VALUE of the runtime")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--global-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--learn", action="store_true", help="documents that can be learned")
    parser.add_argument("--losses", action="store_true", help="print every step's")
    parser.add_argument("--nf4", action="store_true", help="frozen weights in nf4")
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--ceiling", type=float, default=780.0, help="TFLOP/s of a large matrix product")
    given = parser.parse_args()
    PROFILE = given.profile

    import torch

    from stages.train import TrainConfig, memory, model
    from stages.train.supervise import train
    from stages.train.trainer import PackedTrainer

    config: dict[str, Any] = {"method": given.method, "max_steps": given.steps}
    runtime: dict[str, Any] = {
        "save_seconds": 1e9,
        "activation_checkpointing": "none",
        "trackers": (),
        "compile": "always",
    }
    for setting in given.set:
        name, _, value = setting.partition("=")
        target = config
        if not name.startswith("train."):
            target = runtime
        target[name.removeprefix("train.")] = yaml.safe_load(value)

    def load(folder: Path, config: TrainConfig, device: str, split: bool = False, attention: Any = "auto") -> Any:
        from packing.attention import implementation

        made = train_input.model(given.shape, device, attn_implementation=implementation(device, kernel=attention))
        if given.nf4:
            train_input.to_nf4(made)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return made

    model.load = load
    memory.room = lambda device: 10**15  # what is asked for is tried, whatever the plan says
    model.save_weights = lambda *_: None  # 16 GB of random numbers
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokens = (given.steps + 1) * given.global_batch * given.sequence
        inputs = train_input.plan(
            folder, given.shape, tokens, given.sequence, given.global_batch, given.share, given.learn
        )
        watch = Watch()
        step = PackedTrainer.training_step

        def marked_step(*arguments: Any, **named: Any) -> Any:
            watch.mark()
            return step(*arguments, **named)

        PackedTrainer.training_step = marked_step
        work = Work(folder / "work", Runtime.model_validate(runtime), tell=watch)
        (folder / "out").mkdir()
        facts = train(TrainConfig.model_validate(config), {"model": folder, **inputs}, folder / "out", work)
        lines = (
            (folder / "out/metrics.jsonl").read_text().splitlines() if (folder / "out/metrics.jsonl").exists() else []
        )
    ends = watch.ends
    per_step = [json.loads(line)["tokens"] for line in lines]
    seconds = watch.seconds(given.warm)
    rate = sum(per_step[given.warm : -1]) / sum(seconds)
    share = rate * operations(given.shape, given.method, given.share) / (given.ceiling * 1e12)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    reserved = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
    if given.losses:
        print("LOSSES", json.dumps([round(json.loads(line)["loss"], 5) for line in lines]), flush=True)
    settings = " ".join([*given.set, *(["nf4"] if given.nf4 else [])])
    print(
        f"OURS {given.shape} {given.method} {settings} share {given.share}: {rate:,.0f} tok/s (steps of "
        f"{1000 * min(seconds):.0f}-{1000 * max(seconds):.0f} ms), {100 * share:.1f} % of "
        f"{given.ceiling:.0f} TFLOP/s, peak {facts['peak_memory_bytes'] / 2**30:.1f} GiB (reserved {reserved:.1f}), "
        f"loss {facts['first_loss']:.3f} -> {facts['last_loss']:.3f}, {facts['speed']}, "
        f"first step after {ends[1] - ends[0] if 1 in ends and 0 in ends else 0:.0f} s, {where}",
        flush=True,
    )


if __name__ == "__main__":
    main()
