"""A LoRA of SmolLM2-135M on a CPU beside TRL's SFTTrainer: the same documents, weights, adapter and cores.

    OMP_NUM_THREADS=2 python -m benchmarks.train_cpu [--pairs 3] [--steps 4] [--sequence 1024] [--global-batch 2]

Runs the two sides in turn, each in a process of its own, and prints tokens a processor second (and a second) over the
steps after the first, and their ratio pair by pair. Ours is the train stage with its defaults; TRL has its best
settings here: packing, no checkpointing, SDPA, or with `--attention regrow` our attention function. Both compute in
what the processor is fast in (`stages.arithmetic`). Weights are random: they do not change the speed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import train_input

SHAPE = "smollm2"


class Clock:
    """Processor and wall seconds at the end of every step."""

    def __init__(self) -> None:
        self.ends: dict[int, tuple[float, float]] = {}

    def mark(self, step: int) -> None:
        self.ends.setdefault(step, (time.process_time(), time.perf_counter()))

    def rates(self, tokens: dict[int, int]) -> dict[str, float]:
        first, last = min(self.ends), max(self.ends)
        done = sum(count for step, count in tokens.items() if first < step <= last)
        cpu, wall = (self.ends[last][i] - self.ends[first][i] for i in range(2))
        return {"per_cpu_second": done / cpu, "per_second": done / wall, "tokens": done}


def ours(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    from stages.runtime import Runtime
    from stages.stage import Work
    from stages.train import TrainConfig
    from stages.train.supervise import train

    clock = Clock()

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if "loss" in metrics:
            clock.mark(int(done))

    train_input.model(SHAPE, "cpu").save_pretrained(folder / "model")
    tokens = (given.steps + 1) * given.global_batch * given.sequence
    inputs = train_input.plan(folder, SHAPE, tokens, given.sequence, given.global_batch, given.share)
    work = Work(folder / "work", Runtime(device="cpu", trackers=(), save_seconds=1e9), tell=tell)
    (folder / "out").mkdir()
    train(TrainConfig(max_steps=given.steps), {"model": folder / "model", **inputs}, folder / "out", work)
    lines = map(json.loads, (folder / "out/metrics.jsonl").read_text().splitlines())
    return clock.rates({line["step"]: line["tokens"] for line in lines})


def trl(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    from packing.attention import implementation
    from stages import arithmetic

    tokens = (given.steps + 1) * given.global_batch * given.sequence
    rows, starts = train_input.documents(SHAPE, tokens, given.sequence, given.share)
    data = Dataset.from_list(
        [{"input_ids": row, "labels": [-100] * start + row[start:]} for row, start in zip(rows, starts, strict=True)]
    )
    bf16 = arithmetic.fitting("bf16", "cpu") == "bf16"
    attention = implementation("cpu") if given.attention == "regrow" else "sdpa"
    model = train_input.model(SHAPE, "cpu", attn_implementation=attention)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    clock, sizes = Clock(), {0: 0}

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.mark(state.global_step)
                sizes[state.global_step] = int(logs["num_tokens"])

    trainer = trl.SFTTrainer(
        model=model if bf16 else model.to(torch.float32),
        args=trl.SFTConfig(
            output_dir=str(folder),
            max_length=given.sequence,
            packing=True,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=given.global_batch,
            max_steps=given.steps,
            learning_rate=2e-4,
            bf16=bf16,
            use_cpu=True,
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Watch()],
    )
    trainer.train()
    return clock.rates({step: sizes[step] - sizes[step - 1] for step in sizes if step})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=["ours", "trl"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--global-batch", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "regrow"])
    given = parser.parse_args()
    if given.side:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"ours": ours, "trl": trl}[given.side](given, Path(folder))), flush=True)
        return
    ratios = []
    for pair in range(given.pairs):
        found = {}
        for side in ("ours", "trl"):
            command = [sys.executable, "-m", "benchmarks.train_cpu", *sys.argv[1:], "--side", side]
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
        ratios.append(found["ours"]["per_cpu_second"] / found["trl"]["per_cpu_second"])
        told = ", ".join(
            f"{side} {rate['per_cpu_second']:,.0f} tok/cpu-s ({rate['per_second']:,.0f} tok/s)"
            for side, rate in found.items()
        )
        print(f"pair {pair + 1}: {told}, ratio {ratios[-1]:.2f}", flush=True)
    print(f"regrow over TRL, median of {given.pairs} pairs, by processor time: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
