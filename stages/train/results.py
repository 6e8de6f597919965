"""What a training leaves: its artifact's files, and the figures of its record."""

import json
import resource
from pathlib import Path
from typing import Any

import torch

from stages import heads
from stages.stage import Facts
from stages.train import TrainConfig, adamw, model
from stages.train.trainer import PackedTrainer

METRICS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens")
"""What a line of metrics.jsonl holds before the objective's own measures: nothing that a clock decides."""


def write(
    config: TrainConfig, trained: Any, history: list[dict[str, Any]], record: Facts, source: Path, output: Path
) -> None:
    """Write `adapter/` or `weights/`, the objective's own head if it has one, `metrics.jsonl` and `train.json`."""
    if heads.has(trained):
        heads.save({name: adamw.whole(p) for name, p in heads.take(trained).named_parameters()}, output)
    if config.lora.restart_every is not None:  # a sum of adapters has no low rank
        model.save_weights(trained.merge_and_unload(), source, output / "weights")
    elif config.method == "lora":
        model.save_adapter(trained, output / "adapter")
    else:
        model.save_weights(trained, source, output / "weights")
    lines = [
        json.dumps({name: entry[name] for name in (*METRICS, *sorted({*entry} - {*METRICS}))}) for entry in history
    ]
    (output / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (output / "train.json").write_text(
        json.dumps({"method": config.method, "objective": config.objective, "steps": len(lines), **record}, indent=2)
        + "\n"
    )


def figures(trainer: PackedTrainer, resumed: int, seconds: float, device: str) -> Facts:
    """What was trained on and how fast; the speed is that of the steps after `resumed`, which took `seconds`."""
    history, ranks = trainer.state.log_history, trainer.training.group.size
    here = [entry for entry in history if entry["step"] > resumed]
    flops = sum(trainer.training.flops(entry["step"] - 1) for entry in here) / seconds / ranks
    peak = trainer.training.peak
    return {
        "steps": len(history),
        "tokens": sum(entry["tokens"] for entry in history),
        "trained_tokens": sum(entry["trained_tokens"] for entry in history),
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        **(
            {"skipped_steps": int(sum(entry.get("skipped", 0) for entry in history))}
            if "skipped" in history[-1]
            else {}
        ),
        "seconds_of_training": round(seconds, 2),
        "tokens_per_second": round(sum(entry["tokens"] for entry in here) / seconds, 1),
        "model_flops_per_second": round(flops),
        **({"model_flop_utilisation": round(flops / peak, 4)} if peak else {}),
        "peak_memory_bytes": _peak_memory(device),
    }


def _peak_memory(device: str) -> int:
    """Of the GPU's memory, or of this process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
