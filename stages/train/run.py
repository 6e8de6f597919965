"""One attempt at a training, as one rank makes it: load, check, train (or go on training), write."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import set_seed

from packing.attention import implementation
from packing.collate import PackedBins
from stages import arithmetic, context, objectives, quantization
from stages.child import SUSPENDED
from stages.errors import UserError
from stages.stage import Facts, Work
from stages.train import (
    TrainConfig,
    adamw,
    checkpoints,
    checks,
    float8,
    folding,
    memory,
    metrics,
    model,
    optimizers,
    results,
    schedules,
    speed,
    state,
)
from stages.train.data import (
    Steps,
    name_rows,
    open_bins,
    refuse_unknown_tokens,
    step_order,
    to_device,
)
from stages.train.heldout import look_of
from stages.train.planning import place_to_check, plan_memory, refuse_too_big
from stages.train.policy import Watch
from stages.train.proofs import choose_float8, prove_isolation
from stages.train.ranks import Group, Stopping
from stages.train.recomputing import Mode, recompute
from stages.train.samples import batches, one_document, two_documents
from stages.train.sharding import gathered_dtype, shard
from stages.train.trainer import PackedTrainer, make_trainer
from stages.train.training import Training
from stages.train.windows import Windows

FIRST = 16
"""The sequences whose activations adapters may start from."""
FEW = 16
"""Tokens of a batch whose loss does not matter."""
TRIED = 65_536
"""Tokens whose loss in 8 bits is compared with that in 16: fewer say 0.8 to 2.2 % where 1.3 % is true."""


@dataclass(frozen=True)
class Attempt:
    """One try at a training: what a second one may change."""

    device: str
    micro_batch: int | Literal["auto"]
    activation_checkpointing: Mode | Literal["auto"]
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
    bins = open_bins(inputs, config.objective)
    shards = json.loads((inputs["plan"] / "plan.json").read_text())["shards"]
    objective = objectives.find(config.objective)
    identity = state.identity(config, inputs)
    config = config.model_copy(update={"precision": arithmetic.fitting(config.precision, this.device)})
    checkpoint, skipped = _newest(work.folder / "checkpoints", this.below, group)
    if checkpoint:
        state.refuse_foreign(checkpoint, identity)
    left_out = {*this.left_out, *state.left_out(checkpoint)}
    if len(left_out) >= this.total:
        raise UserError(
            f"train: each of the {this.total} steps was left out, so nothing would be trained"
            f"{''.join(f' ({note})' for note in this.notes[-1:])}. Look at the data, or lower train.learning_rate"
        )
    heldout = None if config.evaluate_every is None else PackedBins(None, inputs["plan"], inputs.get("reference"))
    windows = Windows(bins, work.show)
    first = windows.read(range(min(FIRST, len(bins)))) if config.lora.init == "eva" else []
    few = windows.read(range(min(-(-TRIED // bins.sequence_length), len(bins)))) if config.precision == "fp8" else []
    order = step_order(bins.windows, bins.global_batch, this.total, config.seed)
    example = windows.begin(order, int(checkpoint.name) if checkpoint else 0)
    with ExitStack() as stack:
        if work.runtime.deterministic:
            _deterministic(stack)
        set_seed(config.seed)
        how = work.runtime.shard if group.size > 1 else "none"
        sharded = how != "none"
        place = place_to_check(inputs["model"], config, this.device, sharded)
        # Rank 0's, on every rank: each keeps a part of what it made, and devices do not draw or decompose alike.
        place = this.device if group.agree(int(place == this.device)) else "cpu"
        split = speed.splits(config, how)
        loaded = model.load(inputs["model"], config, place, split, work.runtime.attention)
        refuse_unknown_tokens(shards, loaded.get_input_embeddings().weight.shape[0])
        refuse_too_big(loaded, place)
        beyond = context.beyond(loaded, bins.longest)
        trained: Any = model.ready(loaded, config, inputs["model"], place, lambda: batches(first, place))
        faster: dict[str, Any] = {"attention": loaded.config._attn_implementation}
        faster |= speed.hold(trained, config, how)
        isolation = prove_isolation(trained, config, place)
        with speed.autocast(trained, config, place), float8.switched_off(trained):
            options = objectives.options_of(config.objective, config.objective_options)
            tried = to_device(one_document(example), place)
            loss = objective.loss(trained, options, tried)
            baseline = objective.baseline and objective.baseline(trained, options, tried)
        if "float8_layers" in faster:
            faster |= choose_float8(trained, config, objective, loss, few, place, group)
        plan = plan_memory(
            config,
            trained,
            bins,
            example,
            objective,
            loss,
            group,
            this.device,
            how,
            this.micro_batch,
            this.activation_checkpointing,
        )
        tokens = this.total * bins.global_batch * bins.sequence_length // group.size
        offloaded = plan.activation_checkpointing == "offloaded"  # its copies are no part of a graph
        gathers = how.startswith("zero")  # in hooks of DeepSpeed's within layers, which no graph takes
        compiled = not gathers and not offloaded and speed.wants_compiling(work.runtime.compile, this.device, tokens)
        recompute(trained, plan.activation_checkpointing, compiled)
        if plan.wide_sums and how == "none":
            faster["wide_gradients"] = adamw.add_up_wide(trained)
        faster["compiled_layers"] = speed.compile_layers(trained) if compiled else 0
        steps = Steps(
            bins,
            order,
            plan.micro_batch,
            objective,
            config.seed,
            group.rank,
            group.size,
            left_out,
            plan.micro_batch * bins.sequence_length if compiled else speed.PADDING,
            windows,
        )
        counted, size = metrics.counted_weights(trained), model.trainable(trained)
        if checkpoint:
            state.load_weights(trained, checkpoint)
        if place != this.device:  # as the kernel that was proven to isolate documents was the CPU's
            loaded.set_attn_implementation(implementation(this.device, loaded.config, work.runtime.attention))
            faster["attention"] = loaded.config._attn_implementation
        narrow = gathered_dtype(trained, config.precision) if how == "fsdp" else None
        computed = shard(trained, loss, group.size, this.device, narrow) if how == "fsdp" else loss
        cast = not narrow and not adamw.is_split(trained)
        look = look_of(config, objective, heldout, trained, computed, baseline, this.device, cast, group, sharded)
        if how == "fsdp" and this.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the whole model, while it was checked, is no part of training
        trainer = make_trainer(
            trained,
            Training(
                config=config,
                steps=steps,
                loss=computed,
                shard=how,
                cast=cast,
                example=objective.prepare(two_documents(example, FEW)),
                baseline=baseline,
                look=look,
                work=work,
                device=this.device,
                trackers=this.trackers,
                group=group,
                stopping=stopping,
                identity=identity,
                name_rows=lambda numbers: name_rows(inputs["plan"], numbers),
                flops=lambda position: _flops(trained.config, counted, bins, steps.numbers(position)),
                peak=metrics.peak_flops(this.device, work.runtime.peak_tflops),
            ),
        )
        resumed = int(checkpoint.name) if checkpoint else 0
        work.tell(resumed, this.total, "steps", memory_plan=str(plan))
        for said in filter(None, (schedules.unreached(config, this.total), beyond)):
            trainer.note(said)
        ready = time.monotonic()
        try:
            _train(trainer, checkpoint, stopping)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(plan, f"step {trainer.state.global_step + 1}: {error}") from None
        if trainer.state.global_step < this.total and not trainer.between.stop:
            group.meet()
            raise SystemExit(SUSPENDED)
        trainer.between.finish()
    done = time.monotonic()
    weights = state.weights_of(trained, keep=group.rank == 0) if sharded else None
    group.meet()
    if group.rank > 0:
        return {}
    if weights is not None:
        starts = folding.starts(trained)
        loaded = model.load(inputs["model"], config, "cpu")
        trained = model.ready(loaded, config, inputs["model"], "cpu", lambda: batches(first, "cpu"))
        folding.put_starts(trained, starts)
        state.put_weights(trained, weights)
    history, record = trainer.state.log_history, trainer.between.record
    results.write(config, trained, history, record, inputs["model"], output)
    return {
        **results.figures(trainer, resumed, done - ready, this.device),
        "resumed_at_step": resumed,
        "skipped_checkpoints": list(skipped),
        "left_out_steps": [
            {"step": p + 1, "rows": trainer.training.name_rows(steps.numbers(p))} for p in sorted(steps.left_out)
        ],
        "notes": [*this.notes, *trainer.notes],
        "trained_weights": size,
        **({"quantized_share": round(quantization.share(trained), 4)} if config.quantize else {}),
        **record,
        "isolation": dict(isolation),
        "speed": faster,
        "device": this.device,
        "precision": config.precision,
        "device_name": torch.cuda.get_device_name() if this.device == "cuda" else "cpu",
        "ranks": group.size,
        "shard": how,
        "memory_plan": plan.record(),
        "seconds_to_prepare": round(ready - started, 2),
    }


def _newest(folder: Path, below: int | None, group: Group) -> tuple[Path | None, list[str]]:
    """`checkpoints.newest` of rank 0, on every rank: it alone removes any, and all go on from the same."""
    found, skipped = checkpoints.newest(folder, below) if group.rank == 0 else (None, [])
    step = group.agree(int(found.name) if found else -1)
    return folder / str(step) if step >= 0 else None, skipped


def _train(trainer: PackedTrainer, checkpoint: Path | None, stopping: Stopping) -> None:
    """Train, from a checkpoint if there is one; return when the last checkpoint is written, too."""
    group = trainer.training.group
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"] if checkpoint else []
    trainer.watch = Watch.after(history)
    if group.agree(int(stopping.asked)):
        return
    try:
        with optimizers.training(trainer.optimizer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.saver.wait()
    trainer.settle(wait=True)
    if group.agree(int(trainer.trouble is not None)):
        group.meet()
        raise trainer.trouble or SystemExit(SUSPENDED)


def _flops(config: Any, counted: metrics.Counted, bins: PackedBins, numbers: range) -> float:
    lengths = [length for number in numbers for length in bins.document_lengths(number)]
    return metrics.model_flops(config, counted, lengths, int(bins.trained[numbers].sum()))


def _deterministic(stack: ExitStack) -> None:
    """Only operations that repeat, until the stack unwinds; cuBLAS wants to know before it starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
    torch.use_deterministic_algorithms(True)
