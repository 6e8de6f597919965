"""The stage function of train: check, load, train (or go on training), write."""

import json
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from packing.collate import Bin, PackedBins, collate
from packing.isolation import check_isolation
from stages import lm_head, objectives
from stages.child import SUSPENDED
from stages.errors import UserError
from stages.objectives import LossSums, Objective
from stages.stage import Facts, Work
from stages.train import TrainConfig, checkpoints, checks, model, optimizers, quantization
from stages.train.between import heldout_look
from stages.train.data import Steps, name_rows, refuse_unknown_tokens, step_order
from stages.train.trainer import make_trainer, stop_on_sigterm, to_device

METRICS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens")
"""What a line of metrics.jsonl holds: nothing that a clock decides."""


def train(config: TrainConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Train `inputs["model"]` on `inputs["tokens"]` in the order of `inputs["plan"]`.

    Writes `adapter/` or `weights/`, `metrics.jsonl` and `train.json` to `output`, checkpoints to
    `work.folder/checkpoints`, where it also looks for one to go on from. Raises UserError for what a user can mend,
    and SystemExit(75) after SIGTERM, once its state is saved.
    """
    started = time.monotonic()
    bins = _open_bins(inputs)
    objective = objectives.find(config.objective)
    _refuse_other_kinds(config.objective, objective.kinds, bins.kind)
    shards = [shard["path"] for shard in json.loads((inputs["plan"] / "plan.json").read_text())["shards"]]
    device = _device(work.runtime.device)
    checks.refuse_device(config, device)
    total = config.max_steps or math.ceil(config.epochs * bins.steps)
    steps = Steps(bins, step_order(bins.steps, total, config.seed), work.runtime.micro_batch, objective)
    with stop_on_sigterm() as stop:
        set_seed(config.seed)
        loaded = model.load(inputs["model"], config, device)
        refuse_unknown_tokens(inputs["tokens"], shards, loaded.get_input_embeddings().weight.shape[0])
        trained: Any = model.ready(loaded, config, inputs["model"], device, lambda: _first_batches(bins, device))
        isolation = _prove_isolation(trained, device, config.precision)
        with model.autocast(device, config.precision):
            options = objectives.options_of(config.objective, config.objective_options)
            loss = objective.loss(trained, options, to_device(_example(bins), device))
        checkpoint, skipped = checkpoints.newest(work.folder / "checkpoints")
        trainer = make_trainer(
            trained,
            config,
            steps,
            loss,
            device,
            work,
            stop,
            _look(config, objective, inputs, trained, loss, device),
            lambda numbers: name_rows(inputs["tokens"], inputs["plan"], shards, numbers),
        )
        work.tell(int(checkpoint.name) if checkpoint else 0, total, "steps")
        ready = time.monotonic()
        if not stop.asked:
            if checkpoint:
                trainer.load_between(checkpoint)
            with optimizers.training(trainer.optimizer):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < total and not trainer.between.stop:
            raise SystemExit(SUSPENDED)
        trainer.between.finish()
    done = time.monotonic()
    record = trainer.between.record
    _write(config, trained, trainer.state.log_history, record, inputs["model"], output)
    resumed = int(checkpoint.name) if checkpoint else 0
    history = trainer.state.log_history
    return {
        "steps": len(history),
        "resumed_at_step": resumed,
        "skipped_checkpoints": list(skipped),
        "tokens": sum(entry["tokens"] for entry in history),
        "trained_tokens": sum(entry["trained_tokens"] for entry in history),
        "trained_weights": model.trainable(trained),
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        **({"quantized_share": round(quantization.share(trained), 4)} if config.quantize else {}),
        **record,
        "isolation": dict(isolation),
        "device": device,
        "seconds_to_prepare": round(ready - started, 2),
        "seconds_of_training": round(done - ready, 2),
        "tokens_per_second": round(sum(entry["tokens"] for entry in history[resumed:]) / (done - ready), 1),
        "peak_memory_bytes": _peak_memory(device),
    }


def _write(
    config: TrainConfig, trained: Any, history: list[dict[str, Any]], record: Facts, source: Path, output: Path
) -> None:
    if config.lora.restart_every is not None:  # a sum of adapters has no low rank
        model.save_weights(trained.merge_and_unload(), source, output / "weights")
    elif config.method == "lora":
        model.save_adapter(trained, output / "adapter")
    else:
        model.save_weights(trained, source, output / "weights")
    lines = [json.dumps({name: entry[name] for name in METRICS}) for entry in history]
    (output / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (output / "train.json").write_text(
        json.dumps({"method": config.method, "objective": config.objective, "steps": len(lines), **record}, indent=2)
        + "\n"
    )


def _first_batches(bins: PackedBins, device: str, count: int = 16) -> list[dict[str, Any]]:
    """The first packed sequences, as the model takes them."""
    return [to_device(lm_head.model_inputs(collate([bins[i]])), device) for i in range(min(count, len(bins)))]


def _look(
    config: TrainConfig, objective: Objective, inputs: Mapping[str, Path], trained: Any, loss: LossSums, device: str
) -> Callable[[], float] | None:
    """What measures the held-out loss, where the recipe asks for it. Raises UserError when no rows are held out."""
    if config.evaluate_every is None:
        return None
    bins = PackedBins(inputs["tokens"], inputs["plan"], heldout=True, reference=inputs.get("reference"))
    if not bins.trained.sum():
        raise UserError("train.evaluate_every: the plan holds no rows out: set pack.heldout, or a source's split")

    def batch(number: int) -> tuple[Any, int]:
        packed = bins[number]
        counted = int(bins.trained[number]) if objective.counts == "tokens" else len(packed.lengths) // 2
        return to_device(objective.prepare(collate([packed])), device), counted

    return heldout_look(trained, batch, len(bins), loss, lambda: model.autocast(device, config.precision))


def _open_bins(inputs: Mapping[str, Path]) -> PackedBins:
    bins = PackedBins(inputs["tokens"], inputs["plan"], reference=inputs.get("reference"))
    if not len(bins) or not bins.trained.sum():
        raise UserError("the plan holds nothing to train on: see the data report of pack for what was dropped and why")
    return bins


def _refuse_other_kinds(name: str, kinds: Sequence[str], kind: str) -> None:
    if kind not in kinds:
        raise UserError(
            f"train.objective {name} trains on rows of kind {' or '.join(kinds)}, and the plan holds rows of kind "
            f"{kind}: choose another objective, or read the data in another convert.format"
        )


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("the runtime asks for device cuda, but torch finds no CUDA device: use cpu or auto")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _prove_isolation(trained: Any, device: str, precision: str) -> Mapping[str, float]:
    """Packed and unpacked documents compared: on a GPU as they train, because the attention kernel is another in
    float32; on a CPU, where it is not, in float32, which shows differences that bfloat16's own noise would hide.
    """
    try:
        with quantization.exact(trained):
            if device == "cpu":
                with model.in_float32(trained):
                    return check_isolation(trained)
            with model.autocast(device, precision):
                return check_isolation(trained)
    except ValueError as error:
        raise UserError(f"train: {error}") from error


def _example(bins: PackedBins) -> dict[str, Any]:
    """The first document as a model takes it."""
    packed = bins[0]
    length = packed.lengths[0]
    return lm_head.model_inputs(collate([Bin(packed.ids[:length], packed.labels[:length], packed.lengths[:1])]))


def _peak_memory(device: str) -> int:
    """Of the GPU's memory, or of this process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
