"""transformers' Trainer over our optimizer steps, loss and checkpoints.

One item of the data is one optimizer step with all its micro-batches, so a step's losses are summed and divided once by
the number of its trained tokens, whatever the micro-batch, and a step may be shorter than the others. Every rank runs a
Trainer of its own that believes to be alone; what they share goes through `Group`. Everything else is the Trainer's:
optimizer, schedule, clipping, the loop.
"""

import copy
import json
import shutil
import warnings
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from stages.errors import UserError
from stages.objectives import Batch, Sums
from stages.train import optimizers, schedules, speed, state
from stages.train.adamw import SplitAdamW
from stages.train.between import Between
from stages.train.between import make as make_between
from stages.train.checkpoints import Saver
from stages.train.data import Step, to_device
from stages.train.metrics import Queue
from stages.train.over_split import OverSplit
from stages.train.policy import Spike, Upset, Watch
from stages.train.progress import Progress
from stages.train.saving import Saving
from stages.train.training import Training
from stages.train.zero import STAGES, Zero


def make_trainer(model: Any, training: Training) -> "PackedTrainer":
    """A trainer that has not started."""
    config = training.config
    aside = training.work.folder / "unfinished" / str(training.group.rank)
    shutil.rmtree(aside, ignore_errors=True)
    arguments = TrainingArguments(
        output_dir=str(aside),
        num_train_epochs=1,  # of `steps`, which hold all epochs
        per_device_train_batch_size=1,
        max_grad_norm=config.max_gradient_norm,
        bf16=config.precision in ("bf16", "fp8") and training.cast,
        fp16=config.precision == "fp16",
        seed=config.seed,
        use_cpu=training.device == "cpu",
        dataloader_num_workers=0 if training.device == "cpu" else 1,
        save_strategy="no",  # `_Deciding` asks by the clock
        logging_strategy="no",  # figures are read when they have arrived, see `settle`
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(training.trackers) if training.group.rank == 0 else [],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # more than one is several ranks, never DataParallel
    optimizer = optimizers.make(model, config)
    if training.shard in STAGES:
        optimizer, training = _cut(model, training, optimizer)
    schedule = LambdaLR(optimizer, schedules.multiplier(config, len(training.steps)))
    trainer = PackedTrainer(model=model, args=arguments, train_dataset=training.steps, optimizers=(optimizer, schedule))
    between = make_between(
        model,
        config,
        optimizer,
        len(training.steps),
        training.look,
        lambda step, loss: training.work.tell(step, len(training.steps), "steps", heldout_loss=loss),
    )
    trainer.begin(training, between)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(between)
    trainer.add_callback(Saving(training, trainer.saver, lambda: trainer.trouble is not None))
    return trainer


def _cut(model: Any, training: Training, optimizer: Any) -> tuple[Zero, Training]:
    """Have DeepSpeed cut what training holds over the ranks: the optimizer and the training to go on with."""

    def loss(batch: Batch) -> Sums:
        with speed.autocast(model, training.config, training.device):  # the engine switches off the one around it
            return training.loss(batch)

    made = Zero(
        model,
        loss,
        optimizer,
        STAGES[training.shard],
        training.group.size,
        training.device,
        training.config.max_gradient_norm,
        to_device(training.example, training.device),
    )
    return made, replace(training, loss=made.loss)


class PackedTrainer(Trainer):  # type: ignore[misc]
    """Overrides where the Trainer counts on batches of examples, and where it waits for the device."""

    control: TrainerControl
    _tr_loss: torch.Tensor
    training: Training
    between: Between
    saver: Saver
    queue: Queue
    watch: Watch

    @property
    def zero(self) -> Zero | None:
        """The optimizer, where DeepSpeed cuts over ranks what training holds."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper
        return optimizer if isinstance(optimizer, Zero) else None

    def begin(self, training: Training, between: Between) -> None:
        """Set up what lives as long as the training."""
        self.training, self.between, self.queue = training, between, Queue()
        self.saver = Saver(training.work.folder / "checkpoints", Path(self.args.output_dir))
        self.extra: dict[str, Any] = {"between": between}
        """More that checkpoints hold, by name: each has `state_dict` and `load_state_dict`."""
        if self.accelerator.scaler is not None:
            self.extra["scaler"] = self.accelerator.scaler
        self.notes: list[str] = []
        """What a reader of the record should know: spikes that were let pass, checkpoints that failed."""
        self.trouble: Exception | None = None
        """What the training is to end with, when all ranks have stopped."""
        self.progress = Progress(training)
        self._last_position = -1

    # ---- the step ----

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
        if self.accelerator.scaler is not None:
            # A scaler takes a step without gradients for a mistake, and accelerate the last skipped one for this one.
            self.optimizer.scaler = None if self._left_out else self.accelerator.scaler
            self.optimizer._is_overflow = False
        total = torch.zeros((), device=self.args.device)
        self._measures: dict[str, torch.Tensor] = {}
        baseline = self._baseline(inputs)
        for number, each in enumerate(inputs["batches"], 1):
            torch.manual_seed(each["seed"])
            with self.accelerator.autocast():
                sums = self.training.loss(speed.marked(to_device(each["batch"], self.args.device)) | baseline)
                share = each["counts"] / max(inputs["count"], 1)
                loss = sums["loss"] * share
            if self.zero:
                self.zero.backward(loss, last=number == len(inputs["batches"]))
            else:
                self.accelerator.backward(loss)
            total += loss.detach()
            for name, measure in sums.items():
                if name != "loss":
                    self._measures[name] = self._measures.get(name, 0.0) + measure * share
        group = self.training.group
        for measure in self._measures.values():
            group.sum(measure)
        if self.training.shard == "none":
            if inputs["batches"]:
                group.sum_gradients(model.parameters())
            return group.sum(total)
        return group.sum(total) / group.size

    @property
    def _left_out(self) -> bool:
        """Whether the step under way trains nothing."""
        return self.state.global_step in self.training.steps.left_out

    def _baseline(self, inputs: Step) -> dict[str, dict[str, torch.Tensor]]:
        """What the objective wants to know of a whole step before its losses, as their batches take it."""
        if self.training.baseline is None:
            return {}
        means: dict[str, torch.Tensor] = {}
        for each in inputs["batches"]:
            torch.manual_seed(each["seed"])
            with torch.no_grad(), self.accelerator.autocast():
                sums = self.training.baseline(speed.marked(to_device(each["batch"], self.args.device)))
            for name, found in sums.items():
                means[name] = means.get(name, 0.0) + found * (each["counts"] / max(inputs["count"], 1))
        return {"baseline": {name: self.training.group.sum(mean) for name, mean in means.items()}}

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.zero:
            return self.zero.norm  # the engine clips in its step, see `_maybe_log_save_evaluate`
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """The gradient's norm; split weights are clipped in the optimizer's step, which reads gradients anyway."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper
        if isinstance(optimizer, Zero):
            return optimizer.norm
        if self._left_out:
            return torch.zeros((), device=self.args.device)
        if isinstance(optimizer, SplitAdamW | OverSplit):
            self.accelerator.unscale_gradients()  # if there is a scaler
            return optimizer.clip(self.args.max_grad_norm)
        norm: torch.Tensor = super()._clip_grad_norm(model)
        return norm

    def floating_point_ops(self, inputs: Step) -> int:
        """Not counted: the Trainer's formula knows nothing of packing."""
        return 0

    # ---- figures ----

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *_: Any, learning_rate: Any = None, **__: Any
    ) -> None:
        """After every step. The Trainer calls it once more when an epoch ends."""
        position = self.state.global_step - 1
        if position == self._last_position:
            return
        self._last_position = position
        if self.lr_scheduler.last_epoch < self.state.global_step:
            # Of a step that a scaler skipped. Its rate goes with it, or the schedule would not come to its end.
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that no step came before
                self.lr_scheduler.step()
        loss, self._tr_loss = self._tr_loss, torch.zeros_like(self._tr_loss)
        if position not in self.training.steps.left_out:
            steps = self.training.steps
            entry = {"step": position + 1, "learning_rate": float(learning_rate)}
            entry |= {"tokens": steps.tokens(position), "trained_tokens": steps.trained(position)}
            grad_norm = self.zero.norm if self.zero else grad_norm
            norm = grad_norm if isinstance(grad_norm, torch.Tensor) else torch.tensor(float(grad_norm))
            norm = norm.to(loss.device)
            if self.accelerator.scaler is not None:  # which skips just these, where accelerate may not hear of it
                self._measures["skipped"] = ~norm.isfinite()
                norm = norm.nan_to_num(0.0, 0.0)
            self.queue.put(entry, loss=loss, grad_norm=norm, **self._measures)
        ending = self.control.should_save or self.control.should_training_stop
        self.settle(wait=ending or self.state.global_step >= self.state.max_steps)
        if self.control.should_save:
            self._save_checkpoint(None, None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called with the Trainer's summary at the end, which says nothing new."""

    def settle(self, wait: bool = False) -> None:
        """Log the steps whose figures have arrived. Raises UserError or Upset for those that cannot stay. Among several
        ranks that is noted as `trouble`: if one ended at once, others would wait in kernels that gather from it (see
        `Group.meet`)."""
        if self.training.group.rank > 0:
            for _ in self.queue.take(wait):
                pass
            return
        for entry in self.queue.take(wait):
            if self.trouble is None and (found := self.watch.look(entry)):
                self._react(entry["step"], found)
            if self.trouble is not None:  # later steps go, too
                continue
            self.state.log_history.append(entry)
            seen = copy.copy(self.state)
            seen.global_step = entry["step"]
            figures = {name: value for name, value in entry.items() if name != "step"} | self.progress.speed
            self.control = self.callback_handler.on_log(self.args, seen, self.control, figures)
            self.progress.tell_figures(entry)
        for saved in self.saver.finished():
            if saved.path is None:
                self.note(saved.error)
            else:
                self.progress.tell(saved.step, checkpoint=saved.path.name, save_seconds=round(saved.seconds, 2))

    def _react(self, step: int, found: Spike) -> None:
        rows = self.training.name_rows(self.training.steps.numbers(step - 1))
        policy, message = self.training.config.on_spike, f"{found.text} in step {step}; its rows: {rows}"
        if policy == "rollback":
            self._end(Upset(step - 1, message))
        elif policy == "stop" or not found.finite:
            self._end(
                UserError(
                    f"train: {message}. Look at those rows, lower train.learning_rate, or set train.on_spike to "
                    "rollback, which trains on without them"
                )
            )
        else:
            self.note(message)

    def _end(self, trouble: Exception) -> None:
        if self.training.group.size == 1:
            raise trouble
        self.trouble = trouble

    def note(self, message: str) -> None:
        """Have the record and whoever watches hear of something."""
        self.notes.append(message)
        self.progress.tell(self.state.global_step, note=message)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy the training's state and have it written beside the training."""
        keep = self.training.group.rank == 0
        weights = state.weights_of(self.model, keep)
        optimizer = self.zero.state_dict(keep) if self.zero else state.state_of(self.optimizer, keep)
        self.training.group.meet()  # what follows may be the end
        if not keep or self.trouble is not None:
            return
        scheduler = self.lr_scheduler.state_dict()
        extra = {name: state.state_of(each, True) for name, each in self.extra.items()}
        described = {"identity": self.training.identity, "left_out": sorted(self.training.steps.left_out)}
        step, position = self.state.global_step, json.dumps(_plain(self.state))

        def write(folder: Path) -> None:
            state.write(folder, weights, optimizer, scheduler, position, described, extra)

        stopping = self.control.should_training_stop
        self.saver.save(step, write, beside=not stopping)
        self.settle()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights are in the model already: they were put there before it was sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state.load_optimizer(self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / state.SCHEDULER, weights_only=True))
        for name, each in self.extra.items():
            state.load_extra(each, name, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: a step's position seeds it."""


def _plain(found: TrainerState) -> dict[str, Any]:
    """The Trainer's state as far as a later one reads it."""
    names = ("global_step", "max_steps", "epoch", "log_history", "train_batch_size", "logging_steps", "save_steps")
    return {name: getattr(found, name) for name in names}
