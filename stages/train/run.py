"""One attempt at a training, as one rank makes it: load, check, train (or go on training), write."""

import json
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import set_seed

from packing.collate import IGNORED, Bin, PackedBins, collate
from packing.isolation import check_isolation
from stages import arithmetic, lm_head, objectives
from stages.child import SUSPENDED
from stages.errors import UserError
from stages.objectives import LossSums, Objective
from stages.stage import Facts, Work
from stages.train import (
    TrainConfig,
    checkpoints,
    checks,
    memory,
    metrics,
    model,
    optimizers,
    quantization,
    speed,
    state,
)
from stages.train.between import heldout_look
from stages.train.data import Steps, name_rows, refuse_unknown_tokens, step_order
from stages.train.policy import Watch
from stages.train.ranks import Group, Stopping
from stages.train.sharding import shard
from stages.train.trainer import PackedTrainer, Training, make_trainer, to_device

METRICS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens")
"""What a line of metrics.jsonl holds before the objective's own measures: nothing that a clock decides."""


@dataclass(frozen=True)
class Attempt:
    """One try at a training: what a second one may change."""

    device: str
    micro_batch: int | Literal["auto"]
    activation_checkpointing: bool | Literal["auto"]
    total: int
    """Optimizer steps."""
    left_out: tuple[int, ...] = ()
    """Positions that train nothing."""
    below: int | None = None
    """Go on from a checkpoint before this step."""
    trackers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What happened to the attempts before."""


class OutOfMemory(RuntimeError):
    """The device's memory did not suffice, whatever the plan said."""

    def __init__(self, plan: memory.Plan, message: str) -> None:
        super().__init__(message)
        self.plan = plan


def attempt(
    config: TrainConfig,
    inputs: Mapping[str, Path],
    output: Path,
    work: Work,
    this: Attempt,
    group: Group,
    stopping: Stopping,
) -> Facts:
    """Train `inputs["model"]` on `inputs["tokens"]` in the order of `inputs["plan"]`, as one rank of `group`.

    Rank 0 writes `adapter/` or `weights/`, `metrics.jsonl` and `train.json` to `output`, and checkpoints to
    `work.folder/checkpoints`, where all look for one to go on from. Raises UserError for what a user can mend, Upset
    for a step to be left out, and SystemExit(75) after SIGTERM, once the state is saved.
    """
    started = time.monotonic()
    checks.refuse_device(config, this.device)
    bins = open_bins(inputs)
    shards = [shard["path"] for shard in json.loads((inputs["plan"] / "plan.json").read_text())["shards"]]
    objective = objectives.find(config.objective)
    _refuse_other_kinds(config.objective, objective.kinds, bins.kind)
    identity = state.identity(config, inputs)
    config = config.model_copy(update={"precision": arithmetic.fitting(config.precision, this.device)})
    checkpoint, skipped = checkpoints.newest(work.folder / "checkpoints", this.below)
    if checkpoint:
        state.refuse_foreign(checkpoint, identity)
    with ExitStack() as stack:
        if work.runtime.deterministic:
            _deterministic(stack)
        set_seed(config.seed)
        sharded = work.runtime.shard == "fsdp" and group.size > 1
        place = "cpu" if sharded else this.device
        if sharded:
            checks.refuse_shards(config)
        split = optimizers.can_split(config) and not sharded
        loaded = model.load(inputs["model"], config, place, split)
        refuse_unknown_tokens(inputs["tokens"], shards, loaded.get_input_embeddings().weight.shape[0])
        _refuse_too_big(loaded, place)
        trained: Any = model.ready(loaded, config, inputs["model"], place, lambda: _first_batches(bins, place))
        faster: dict[str, Any] = dict(speed.hold(trained, config, sharded))
        isolation = _prove_isolation(trained, config, place)
        with speed.autocast(trained, config, place):
            options = objectives.options_of(config.objective, config.objective_options)
            loss = objective.loss(trained, options, to_device(_example(bins), place))
        plan = _plan(config, work, this, trained, bins, objective, loss, group, sharded)
        tokens = this.total * bins.global_batch * bins.sequence_length // group.size
        compiled = not sharded and speed.wants_compiling(work.runtime.compile, place, tokens)
        faster["compiled_layers"] = speed.compile_layers(trained) if compiled else 0
        steps = Steps(
            bins,
            step_order(bins.steps, this.total, config.seed),
            plan.micro_batch,
            objective,
            config.seed,
            group.rank,
            group.size,
            {*this.left_out, *state.left_out(checkpoint)},
            plan.micro_batch * bins.sequence_length if compiled else speed.PADDING,
        )
        counted, size = metrics.counted_weights(trained), model.trainable(trained)
        if checkpoint:
            state.load_weights(trained, checkpoint)
        computed = shard(trained, loss, group.size, this.device) if sharded else loss
        trainer = make_trainer(
            trained,
            Training(
                config=config,
                steps=steps,
                loss=computed,
                look=_look(config, objective, inputs, trained, computed, this.device, group, sharded),
                work=work,
                device=this.device,
                activation_checkpointing=plan.activation_checkpointing,
                trackers=this.trackers,
                group=group,
                stopping=stopping,
                identity=identity,
                name_rows=lambda numbers: name_rows(inputs["tokens"], inputs["plan"], shards, numbers),
                flops=lambda position: _flops(trained.config, counted, bins, steps.numbers(position)),
                peak=metrics.peak_flops(this.device, work.runtime.peak_tflops),
            ),
        )
        resumed = int(checkpoint.name) if checkpoint else 0
        work.tell(resumed, this.total, "steps", memory_plan=str(plan))
        ready = time.monotonic()
        try:
            _train(trainer, checkpoint, stopping)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(plan, f"step {trainer.state.global_step + 1}: {error}") from None
        if trainer.state.global_step < this.total and not trainer.between.stop:
            raise SystemExit(SUSPENDED)
        trainer.between.finish()
    done = time.monotonic()
    weights = state.weights_of(trained, keep=group.rank == 0) if sharded else None
    if group.rank > 0:
        return {}
    if weights is not None:
        loaded = model.load(inputs["model"], config, "cpu")
        trained = model.ready(loaded, config, inputs["model"], "cpu", lambda: _first_batches(bins, "cpu"))
        state.put_weights(trained, weights)
    history = trainer.state.log_history
    record = trainer.between.record
    _write(config, trained, history, record, inputs["model"], output)
    here = [entry for entry in history if entry["step"] > resumed]
    seconds = done - ready
    flops = sum(trainer.training.flops(entry["step"] - 1) for entry in here) / seconds / group.size
    return {
        "steps": len(history),
        "resumed_at_step": resumed,
        "skipped_checkpoints": list(skipped),
        "left_out_steps": [
            {"step": p + 1, "rows": trainer.training.name_rows(steps.numbers(p))} for p in sorted(steps.left_out)
        ],
        "notes": [*this.notes, *trainer.notes],
        "tokens": sum(entry["tokens"] for entry in history),
        "trained_tokens": sum(entry["trained_tokens"] for entry in history),
        "trained_weights": size,
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        **({"quantized_share": round(quantization.share(trained), 4)} if config.quantize else {}),
        **record,
        "isolation": dict(isolation),
        "speed": faster,
        "device": this.device,
        "precision": config.precision,
        "device_name": torch.cuda.get_device_name() if this.device == "cuda" else "cpu",
        "ranks": group.size,
        "shard": work.runtime.shard if group.size > 1 else "none",
        "memory_plan": plan.record(),
        "seconds_to_prepare": round(ready - started, 2),
        "seconds_of_training": round(seconds, 2),
        "tokens_per_second": round(sum(entry["tokens"] for entry in here) / seconds, 1),
        "model_flops_per_second": round(flops),
        **({"model_flop_utilisation": round(flops / peak, 4)} if (peak := trainer.training.peak) else {}),
        "peak_memory_bytes": _peak_memory(this.device),
    }


def _train(trainer: PackedTrainer, checkpoint: Path | None, stopping: Stopping) -> None:
    """Train, from a checkpoint if there is one; return when the last checkpoint is written, too."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"] if checkpoint else []
    trainer.watch = Watch.after(history)
    if trainer.training.group.agree(int(stopping.asked)):
        return
    try:
        with optimizers.training(trainer.optimizer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.saver.wait()
    trainer.settle(wait=True)


def _refuse_too_big(trained: Any, device: str) -> None:
    """Raise UserError for weights that do not even fit where they are to be trained."""
    size, room = sum(p.numel() * p.element_size() for p in trained.parameters()), memory.room(device)
    if device == "cuda" and size > room:
        raise UserError(
            f"the model's weights take {size / 1e9:.1f} GB, and the device has {room / 1e9:.1f} GB free: train a "
            "smaller model, or several ranks with the runtime's shard: fsdp"
        )


def _plan(
    config: TrainConfig,
    work: Work,
    this: Attempt,
    trained: Any,
    bins: PackedBins,
    objective: Objective,
    loss: LossSums,
    group: Group,
    sharded: bool,
) -> memory.Plan:
    """The memory plan, rank 0's on every rank. Raises UserError when nothing fits."""
    place = "cpu" if sharded else this.device

    def forward(tokens: int) -> torch.Tensor:
        with speed.autocast(trained, config, place):
            return loss(to_device(objective.prepare(_trial(bins, tokens)), place))["loss"]

    shards = group.size if sharded else 1
    costs = memory.measure(trained, forward, config.optimizer, config.precision, shards)
    room, length = memory.room(this.device), bins.sequence_length
    frozen = sum(p.numel() for p in trained.parameters()) * (4 if config.precision == "fp32" else 2)
    plan = memory.choose(
        costs,
        room,
        length,
        -(-bins.global_batch // group.size),
        this.micro_batch,
        this.activation_checkpointing,
        this.device,
        lambda: memory.nearest(costs, room, length, config.method, frozen, group.size, work.runtime.shard, this.device),
    )
    agreed = group.agree(plan.micro_batch), bool(group.agree(int(plan.activation_checkpointing)))
    plan = replace(plan, micro_batch=agreed[0], activation_checkpointing=agreed[1])
    if group.rank == 0:
        print(plan, flush=True)  # noqa: T201  (a stage's prints are its log)
    return plan


def _trial(bins: PackedBins, tokens: int) -> dict[str, Any]:
    """A batch to measure on: two documents with so many tokens in all, and all of them train."""
    packed = bins[0]
    ids = np.resize(packed.ids, tokens)
    labels = ids.astype(np.int64)
    labels[[0, tokens // 2]] = IGNORED
    reference = None if packed.reference is None else np.zeros(tokens, np.float32)
    lengths = np.array([tokens // 2, tokens - tokens // 2])
    return collate([Bin(ids, labels, lengths, reference=reference)])


def _flops(config: Any, counted: tuple[int, int], bins: PackedBins, numbers: range) -> float:
    lengths = [length for number in numbers for length in bins.document_lengths(number)]
    return metrics.model_flops(config, *counted, lengths, int(bins.trained[numbers].sum()))


def _deterministic(stack: ExitStack) -> None:
    """Only operations that repeat, until the stack unwinds; cuBLAS wants to know before it starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
    torch.use_deterministic_algorithms(True)


def _write(
    config: TrainConfig, trained: Any, history: list[dict[str, Any]], record: Facts, source: Path, output: Path
) -> None:
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


def _first_batches(bins: PackedBins, device: str, count: int = 16) -> list[dict[str, Any]]:
    """The first packed sequences, as the model takes them."""
    return [to_device(lm_head.model_inputs(collate([bins[i]])), device) for i in range(min(count, len(bins)))]


def _look(
    config: TrainConfig,
    objective: Objective,
    inputs: Mapping[str, Path],
    trained: Any,
    loss: LossSums,
    device: str,
    group: Group,
    sharded: bool,
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

    # Ranks that hold parts of one model compute together, so each takes all batches.
    numbers = range(len(bins)) if sharded else range(group.rank, len(bins), group.size)
    return heldout_look(trained, batch, numbers, loss, lambda: speed.autocast(trained, config, device), group.sum)


def open_bins(inputs: Mapping[str, Path]) -> PackedBins:
    """The plan's training bins. Raises UserError when there is nothing to train on."""
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


def _prove_isolation(trained: Any, config: TrainConfig, device: str) -> Mapping[str, float]:
    """Packed and unpacked documents compared: on a GPU as they train, because the attention kernel is another in
    float32; on a CPU, where it is not, in float32, which shows differences that bfloat16's own noise would hide.
    """
    try:
        with quantization.exact(trained):
            if device == "cpu":
                with model.in_float32(trained):
                    return check_isolation(trained)
            with speed.autocast(trained, config, device):
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
