"""DPO as a recipe starts it beside TRL's DPOTrainer, on one random model and the same pairs.

    python -m benchmarks.train_dpo ours 1b lora
    python -m benchmarks.train_dpo trl 1b lora --rows 4
    python -m benchmarks.train_dpo ours smollm2 full --precision fp32     # losses that can be compared digit by digit

Every step reads all pairs once, so that the losses of both sides are about the same, whatever the order. Both take the
reference's log-probabilities from before training. Prints the loss of each step, tokens a second (prompts counted
twice, as both compute them twice) and peak memory.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import train_input
from packing.plan import pack
from stages.tables import BINS, documents_schema, tokens_schema, write_table

BETA, LEARNING_RATE, LONGEST = 0.1, 1e-4, 2048
SHARD = "pairs/00000"
Pair = tuple[list[int], list[int], list[int]]


def pairs(shape: str, count: int) -> list[Pair]:
    """Random prompts (log-normal, median 150 tokens) with two answers each (median 300)."""
    random = np.random.default_rng(0)
    vocabulary = train_input.SHAPES[shape]["vocab_size"] - 3

    def text(median: int, most: int) -> list[int]:
        size = int(np.clip(random.lognormal(np.log(median), 0.8), 8, most))
        found: list[int] = (3 + random.integers(0, vocabulary, size)).tolist()
        return found

    return [(text(150, 800), text(300, LONGEST - 800), text(300, LONGEST - 800)) for _ in range(count)]


def size(rows: list[Pair]) -> int:
    """Tokens in all sequences."""
    return sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in rows)


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def peak() -> float:
    """GiB."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def plan(folder: Path, shape: str, rows: list[Pair], sequence: int) -> dict[str, Path]:
    """The pairs as the stages tokenize and pack would leave them, all in one step."""
    tokens = folder / "tokens" / SHARD
    sequences = [[*prompt, *answer] for prompt, *answers in rows for answer in answers]
    starts = [len(prompt) for prompt, *_ in rows for _ in range(2)]
    write_table(
        tokens / "tokens.arrow",
        tokens_schema(train_input.SHAPES[shape]["vocab_size"]),
        ({"ids": ids} for ids in sequences),
    )
    (tokens / "counts.json").write_text(json.dumps({"kind": "preference"}))
    write_table(
        folder / "plan/documents.arrow",
        documents_schema(1, sequence),
        (
            {"shard": 0, "row": i, "number": i // 2, "length": len(ids), "trained": [{"start": begin, "end": len(ids)}]}
            for i, (ids, begin) in enumerate(zip(sequences, starts, strict=True))
        ),
    )
    lengths = np.array([len(ids) for ids in sequences])
    found = pack(lengths.reshape(-1, 2).sum(1), sequence, global_batch=len(rows), seed=0)
    bins = [
        [number for pair in found.documents[a:b].tolist() for number in (2 * pair, 2 * pair + 1)]
        for a, b in itertools.pairwise(found.offsets)
    ]
    write_table(
        folder / "plan/bins.arrow",
        BINS,
        (
            {
                "documents": numbers,
                "length": int(lengths[numbers].sum()),
                "trained": sum(len(sequences[n]) - starts[n] for n in numbers),
            }
            for numbers in bins
        ),
    )
    description = {
        "kind": "preference",
        "sequence_length": sequence,
        "global_batch": len(bins),
        "max_documents": max(map(len, bins)),
        "shards": [
            {"path": SHARD, "source": "pairs", "split": "train", "highest_token": max(map(max, sequences))},
        ],
    }
    (folder / "plan/plan.json").write_text(json.dumps(description))
    return {"tokens": folder / "tokens", "plan": folder / "plan"}


def ours(given: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Losses of all steps, and the seconds that steps took."""
    import torch

    from packing.attention import implementation
    from stages import generation, scoring
    from stages.runtime import Runtime
    from stages.score import ScoreConfig
    from stages.stage import Work
    from stages.train import TrainConfig, memory, model
    from stages.train.supervise import train
    from stages.train.trainer import PackedTrainer

    def load(*_: Any, **__: Any) -> Any:
        made = train_input.model(given.shape, device(), attn_implementation=implementation(device()))
        return made.float() if given.precision == "fp32" else made

    generation.load_network = lambda *_, **__: load().eval()
    model.load = load
    model.save_weights = lambda *_: None
    memory.room = lambda device: 10**15
    marks: list[float] = []
    step = PackedTrainer.training_step

    def marked(*arguments: Any, **named: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # once a step of many sequences
        marks.append(time.perf_counter())
        return step(*arguments, **named)

    PackedTrainer.training_step = marked
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = plan(folder, given.shape, pairs(given.shape, given.pairs), given.sequence)
        runtime = {
            "save_seconds": 1e9,
            "activation_checkpointing": "none",
            "trackers": (),
            "compile": "always" if torch.cuda.is_available() else "auto",
            "micro_batch": 1,
        }
        work = Work(folder / "work", Runtime.model_validate(runtime), tell=lambda *_, **__: None)
        reference = folder / "reference" / SHARD
        reference.mkdir(parents=True)
        began = time.perf_counter()
        scored = {"tokens": inputs["tokens"] / SHARD, "model": folder}
        scoring.score(ScoreConfig(precision=given.precision), scored, reference, work)
        print(f"reference: {time.perf_counter() - began:.1f} s", flush=True)
        scoring._kept.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        (folder / "out").mkdir()
        config = {
            "objective": "dpo",
            "objective_options": {"beta": BETA},
            "method": given.method,
            "max_steps": given.steps,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup": 0,
            "precision": given.precision,
            "lora": {"rank": 16, "alpha": 32},
        }
        everything = {"model": folder, "reference": folder / "reference", **inputs}
        train(TrainConfig.model_validate(config), everything, folder / "out", work)
        lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], np.diff(marks).tolist()


def theirs(given: argparse.Namespace) -> tuple[list[float], list[float]]:
    """The same of TRL."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    words = train_input.SHAPES[given.shape]["vocab_size"]
    inner = Tokenizer(models.WordLevel({f"w{n}": n for n in range(3, words)} | {"<pad>": 0, "</s>": 1}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")

    def text(ids: list[int]) -> str:
        return " ".join(f"w{n}" for n in ids)

    rows = pairs(given.shape, given.pairs)  # it ends answers that do not end with its </s>, so the last word makes room
    data = Dataset.from_list(
        [
            {"prompt": text(prompt) + " ", "chosen": text(chosen[:-1]) + " </s>", "rejected": text(bad[:-1]) + " </s>"}
            for prompt, chosen, bad in rows
        ]
    )
    model = train_input.model(given.shape, device(), attn_implementation="sdpa")
    if given.precision == "fp32":
        model = model.float()
    marks: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder,
            max_length=LONGEST,
            beta=BETA,
            precompute_ref_log_probs=True,
            per_device_train_batch_size=given.rows,
            gradient_accumulation_steps=given.pairs // given.rows,
            max_steps=given.steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=given.precision == "bf16" and device() == "cuda",
            use_cpu=device() == "cpu",
            gradient_checkpointing=given.checkpointing,
            torch_compile=given.compile,
            use_liger_kernel=device() == "cuda" and not given.no_liger,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = trl.DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            if given.method == "lora"
            else None,
            callbacks=[Watch()],
        )
        if device() == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return losses, np.diff(marks).tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "trl"])
    parser.add_argument("shape")
    parser.add_argument("method", choices=["full", "lora"])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--sequence", type=int, default=8192, help="ours: tokens a packed sequence")
    parser.add_argument("--rows", type=int, default=4, help="TRL: pairs a micro-batch")
    parser.add_argument("--checkpointing", action="store_true", help="TRL's")
    parser.add_argument("--compile", action="store_true", help="TRL's")
    parser.add_argument("--no-liger", action="store_true")
    given = parser.parse_args()
    if given.steps < given.warm + 2:  # a step is timed from its start to the next one's
        parser.error("--steps must be at least --warm + 2")
    losses, seconds = (ours if given.side == "ours" else theirs)(given)
    timed = seconds[given.warm :]
    tokens = size(pairs(given.shape, given.pairs))
    settings = [f"rows {given.rows}"] if given.side == "trl" else [f"sequence {given.sequence}"]
    settings += [name for name in ("checkpointing", "compile", "no_liger") if getattr(given, name)]
    print("LOSSES", json.dumps([round(loss, 5) for loss in losses]))
    print(
        f"{given.side.upper()} dpo {given.shape} {given.method} {given.precision} {', '.join(settings)}: "
        f"{tokens / float(np.median(timed)):,.0f} tok/s (steps of {min(timed):.2f}-{max(timed):.2f} s, "
        f"{tokens:,} tokens), peak {peak():.1f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
