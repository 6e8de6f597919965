"""transformers' Trainer over our optimizer steps, loss and checkpoints.

One item of the data is one optimizer step with all its micro-batches, so a step's losses are summed and divided once by
the number of its trained tokens, whatever the micro-batch, and a step may be shorter than the others. Everything else
is the Trainer's: optimizer, schedule, clipping, resuming.
"""

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.errors import UserError
from stages.objectives import Batch, LossSums
from stages.stage import Work
from stages.train import TrainConfig, checkpoints, optimizers, schedules
from stages.train.between import Between
from stages.train.between import make as make_between
from stages.train.data import Step, Steps

BETWEEN = "between.pt"
TELL_SECONDS = 0.2
"""Progress is told at most this often."""


@dataclass
class StopRequest:
    """Whether somebody asked the training to stop (SIGTERM)."""

    asked: bool = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Turn SIGTERM into a request while the block runs. Outside the main thread there is nobody to signal."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(*_: object) -> None:
        request.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Recomputing activations, under the name that this version of transformers knows it by."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False}}


def make_trainer(
    model: Any,
    config: TrainConfig,
    steps: Steps,
    loss: LossSums,
    device: str,
    work: Work,
    stop: StopRequest,
    look: Callable[[], float] | None,
    name_rows: Callable[[range], str],
) -> "PackedTrainer":
    """A trainer that has not started. `look` measures the held-out loss; `name_rows` names the rows in some bins, for
    errors."""
    aside = work.folder / "unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    arguments = TrainingArguments(
        output_dir=str(aside),
        num_train_epochs=1,  # of `steps`, which hold all epochs
        per_device_train_batch_size=1,
        max_grad_norm=config.max_gradient_norm,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        seed=config.seed,
        use_cpu=device == "cpu",
        **_checkpointing(work.runtime.activation_checkpointing),
        dataloader_num_workers=0 if device == "cpu" else 1,
        save_strategy="no",  # `_Saving` asks by the clock
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
    )
    optimizer = optimizers.make(model, config)
    schedule = LambdaLR(optimizer, schedules.multiplier(config, len(steps)))
    trainer = PackedTrainer(model=model, args=arguments, train_dataset=steps, optimizers=(optimizer, schedule))
    trainer.loss, trainer.work, trainer.name_rows, trainer.started = loss, work, name_rows, time.monotonic()
    trainer.between = make_between(
        model,
        config,
        optimizer,
        len(steps),
        look,
        lambda step, loss: work.tell(step, len(steps), "steps", heldout_loss=loss),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(trainer.between)
    trainer.add_callback(_Saving(work.runtime.save_seconds, stop))
    return trainer


def to_device(batch: Batch, device: "str | torch.device") -> dict[str, Any]:
    """A batch with its tensors on a device; from pinned memory without waiting."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class PackedTrainer(Trainer):  # type: ignore[misc]
    """Overrides where the Trainer counts on batches of examples."""

    loss: LossSums
    work: Work
    name_rows: Callable[[range], str]
    started: float
    between: Between
    _told = (0.0, 0)
    """When progress was last told, and the step."""

    def get_train_dataloader(self) -> DataLoader[Step]:
        """The steps one by one. Not prepared by accelerate: a step is dealt to ranks by bins, not by items."""
        return DataLoader(
            self.train_dataset,
            batch_size=1,
            sampler=SequentialSampler(self.train_dataset),
            collate_fn=itemgetter(0),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
        )

    def training_step(
        self, model: Any, inputs: Step, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of all micro-batches; returns the step's loss a trained token, on the device."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        for batch in inputs["batches"]:
            with self.accelerator.autocast():
                loss = self.loss(to_device(batch, self.args.device))["loss"] / max(inputs["count"], 1)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def floating_point_ops(self, inputs: Step) -> int:
        """Not counted: the Trainer's formula knows nothing of packing."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Once a step. Raises UserError when the loss or the gradient is no longer a number."""
        if "loss" not in logs:  # the summary at the end
            return
        step = self.state.global_step
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs[name]):
                rows = self.name_rows(self.train_dataset.numbers(step - 1))
                raise UserError(
                    f"train: the {name} of step {step} is {logs[name]}: lower train.learning_rate, or look at the rows "
                    f"of that step: {rows}"
                )
        logs["tokens"] = self.train_dataset.tokens(step - 1)
        logs["trained_tokens"] = self.train_dataset.trained(step - 1)
        super().log(logs, start_time)
        self._tell(step, logs)

    def _tell(self, step: int, logs: dict[str, float]) -> None:
        now = time.monotonic()
        before, first = self._told
        if now - before < TELL_SECONDS and step < self.state.max_steps:
            return
        first = first if before else step - 1
        seconds = now - (before or self.started)
        tokens = sum(self.train_dataset.tokens(i) for i in range(first, step))
        self._told = (now, step)
        self.work.tell(
            step,
            self.state.max_steps,
            "steps",
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            tokens_per_second=round(tokens / seconds, 1) if seconds > 0 else None,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save aside as the Trainer does, then make it visible in one move."""
        super()._save_checkpoint(model, trial)
        step = self.state.global_step
        aside = Path(self.args.output_dir) / f"checkpoint-{step}"
        torch.save(self.between.state_dict(), aside / BETWEEN)
        (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        saved = checkpoints.publish(aside, self.work.folder / "checkpoints", step)
        self.work.tell(step, self.state.max_steps, "steps", checkpoint=saved.name)

    def load_between(self, checkpoint: Path) -> None:
        """Put back what happens between steps."""
        self.between.load_state_dict(torch.load(checkpoint / BETWEEN, map_location="cpu", weights_only=True))


class _Saving(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint every so many seconds, and for a last one when the training is to stop."""

    def __init__(self, seconds: float, stop: StopRequest) -> None:
        self.seconds, self.stop, self.saved = seconds, stop, time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        last = state.global_step >= state.max_steps
        if not last and (self.stop.asked or time.monotonic() - self.saved >= self.seconds):
            control.should_save = True
            control.should_training_stop = self.stop.asked
            self.saved = time.monotonic()
        return control
