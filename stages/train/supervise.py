"""The stage function of train: attempts, until one comes to its end.

Alone, an attempt runs in this process; several ranks are processes of their own (`stages.train.ranks`). What a second
attempt can mend is tried again from the newest checkpoint: a batch that upset the training is left out, a micro-batch
that did not fit into memory becomes smaller.
"""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from stages.errors import UserError
from stages.runtime import Runtime
from stages.stage import Facts, Work
from stages.streams import Streams
from stages.train import TrainConfig, checks, trackers, zero
from stages.train.data import open_bins
from stages.train.memory import ACTIVATIONS, smaller
from stages.train.policy import MOST_LEFT_OUT, Upset
from stages.train.ranks import Event, Group, Stopping, join, launch
from stages.train.run import Attempt, OutOfMemory, attempt
from stages.train.schedules import steps_in


def train(config: TrainConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Train, however many attempts and ranks it takes. See `stages.train.run.attempt` for inputs, files and errors."""
    bins, runtime = open_bins(inputs, config.objective), work.runtime
    device = _device(runtime.device)
    # accelerate imports DeepSpeed where there is one, and it would look around and say so.
    os.environ["DS_ACCELERATOR"] = device
    devices = _devices(device)
    ranks = _ranks(runtime, devices, bins.global_batch)
    if ranks > 1 and runtime.shard != "none":
        zero.require(runtime.shard)
        checks.refuse_sharded(config, runtime.shard)
    total = config.max_steps or steps_in(config.epochs, bins.steps)
    reporting = trackers.chosen(runtime, work.folder.name)
    this = Attempt(device, runtime.micro_batch, runtime.activation_checkpointing, total, trackers=reporting)
    with stop_on_sigterm() as stopping:
        while True:
            event = _attempt(config, inputs, output, work, this, ranks, devices, stopping)
            if event["event"] == "done":
                facts: Facts = event["facts"]
                return facts
            this = _without(this, event) if event["event"] == "upset" else _smaller(this, event)
            work.tell(0, this.total, "steps", note=this.notes[-1])
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def _attempt(
    config: TrainConfig,
    inputs: Mapping[str, Path],
    output: Path,
    work: Work,
    this: Attempt,
    ranks: int,
    devices: list[str],
    stopping: Stopping,
) -> Event:
    """Make one attempt; return how it ended."""
    if ranks == 1:
        return _ended(lambda: attempt(config, inputs, output, work, this, Group(), stopping))
    job = {
        "config": config.model_dump(mode="json"),
        "inputs": {name: str(path) for name, path in inputs.items()},
        "output": str(output),
        "work": str(work.folder),
        "runtime": work.runtime.model_dump(mode="json"),
        "where": dict(work.where),
        "attempt": asdict(this),
    }

    def on_event(event: Event) -> None:
        work.tell(event["done"], event["total"], event["unit"], **event["metrics"])

    work.folder.mkdir(parents=True, exist_ok=True)
    return launch(job, ranks, devices, on_event, stopping)


def run_rank(job: Mapping[str, Any], send: Callable[[Event], None], stopping: Stopping) -> Event:
    """One rank's attempt, called in its own process (`stages.train.ranks`)."""

    def tell(done: float, total: float | None = None, unit: str = "", **metrics: Any) -> None:
        if job["rank"] == 0:
            send({"event": "tell", "done": done, "total": total, "unit": unit, "metrics": metrics})

    runtime = Runtime.model_validate(job["runtime"])
    streams = Streams(Path(job["work"]), runtime, job["rank"])
    work = Work(Path(job["work"]), runtime, job["where"], tell, streams.show)
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in job["attempt"].items()
    }
    this = Attempt(**given)
    inputs = {**{name: Path(path) for name, path in job["inputs"].items()}, **streams.folders}
    config = TrainConfig.model_validate(job["config"])
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()  # its Trainer wonders at a process group that it was not told of
    group = join(job["rank"], job["ranks"], job["rendezvous"], this.device, runtime.silence_seconds)
    return _ended(lambda: attempt(config, inputs, Path(job["output"]), work, this, group, stopping))


def _ended(make: Callable[[], Facts]) -> Event:
    """How an attempt ended, as far as another one could mend it."""
    try:
        return {"event": "done", "facts": make()}
    except Upset as upset:
        return {"event": "upset", "position": upset.position, "message": str(upset)}
    except OutOfMemory as error:
        plan = error.plan
        used = {"micro_batch": plan.micro_batch, "recompute": plan.activation_checkpointing, "least": plan.costs.least}
        return {"event": "out_of_memory", "plan": str(plan), "message": str(error), **used}


def _without(this: Attempt, event: Event) -> Attempt:
    """The next attempt, without the step that upset this one."""
    if len(this.left_out) >= MOST_LEFT_OUT:
        raise UserError(
            f"train: {event['message']}; {MOST_LEFT_OUT} steps were left out before it. Lower train.learning_rate, or "
            "look at the data"
        )
    note = f"rolled back, leaving out a step: {event['message']}"
    left_out, notes = (*this.left_out, event["position"]), (*this.notes, note)
    return replace(this, left_out=left_out, below=event["position"] + 1, notes=notes)


def _smaller(this: Attempt, event: Event) -> Attempt:
    """The next attempt after one that ran out of memory, once. Raises UserError the second time."""
    told = f"the device ran out of memory in {event['message'].strip()} ({event['plan']})"
    found = smaller(event["micro_batch"], event["recompute"], event["least"])
    if found is None or any("ran out of memory" in note for note in this.notes):
        raise UserError(
            f"train: {told}: close what else uses the device, lower pack.sequence_length, set "
            "REGROW_ACTIVATION_CHECKPOINTING=offloaded, or use train.method lora"
        )
    note = f"{told}; went on with micro-batch {found[0]}, activations {ACTIVATIONS[found[1]]}"
    # What was saved since a rollback leaves its step out already, and is gone on with.
    return replace(this, micro_batch=found[0], activation_checkpointing=found[1], below=None, notes=(*this.notes, note))


@contextmanager
def stop_on_sigterm() -> Iterator[Stopping]:
    """Turn SIGTERM into a request while the block runs. Outside the main thread there is nobody to signal."""
    request = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    before = signal.signal(signal.SIGTERM, request.ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("the runtime asks for device cuda, but torch finds no CUDA device: use cpu or auto")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _devices(device: str) -> list[str]:
    """The names of the CUDA devices that this process may use."""
    if device == "cpu":
        return []
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return seen or [str(number) for number in range(torch.cuda.device_count())]


def _ranks(runtime: Runtime, devices: list[str], global_batch: int) -> int:
    """How many ranks train. Raises UserError for more than there are devices, or than a step has sequences."""
    if runtime.ranks == "auto":
        return max(1, min(len(devices), global_batch))
    if devices and runtime.ranks > len(devices):
        raise UserError(f"the runtime asks for {runtime.ranks} ranks, but there are {len(devices)} CUDA devices")
    if runtime.ranks > global_batch:
        raise UserError(
            f"the runtime asks for {runtime.ranks} ranks, but a step has only {global_batch} sequences: lower the "
            "ranks, or raise pack.global_batch"
        )
    return runtime.ranks
