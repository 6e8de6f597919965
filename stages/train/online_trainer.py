"""TRL's trainers as online training runs them: their arguments, their checkpoints, and figures under our names."""

import importlib
import logging
import math
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from stages import objectives
from stages.errors import UserError
from stages.objectives.grpo import RewardedOptions, SampledOptions
from stages.objectives.on_policy_distillation import OnPolicyOptions
from stages.stage import Work
from stages.train import TrainConfig, checkpoints, teacher, weights
from stages.train.rollouts import Recorder

MEASURES = {
    "reward": "reward",
    "reward_std": "reward_std",
    "kl": "kl",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "cut_off",
    "frac_reward_zero_std": "equal_groups",
    "clip_ratio/region_mean": "clip_fraction",
    "entropy": "entropy",
    "tools/call_frequency": "tool_calls",
    "tools/failure_frequency": "tool_failures",
    "sampling/sampling_logp_difference/mean": "vllm_difference",
    "feature_loss": "feature_loss",
}
"""TRL's names to ours. `equal_groups` is the share of prompts whose completions all got the same reward: nothing is
learned from those. `cut_off` is the share of completions that reached the most tokens, or whose last call nothing
answered. `tool_calls` are an episode's, and `tool_failures` the share of them that gave an error. `vllm_difference` is
how far vLLM's log-probabilities of the tokens it wrote are from the model's own, in the mean. `feature_loss` is how far
features are from the reference's, squared."""

SHOWN = (
    "loss",
    "grad_norm",
    "reward",
    "kl",
    "completion_length",
    "cut_off",
    "equal_groups",
    "clip_fraction",
    "feature_loss",
)
"""What is told while it trains."""


def group_and_iterations(options: SampledOptions) -> tuple[int, int]:
    """Completions to each prompt, and how often each batch of them is trained on."""
    return getattr(options, "group_size", 1), getattr(options, "iterations", 1)


def arguments(
    config: TrainConfig,
    options: SampledOptions,
    online: objectives.Online,
    total: int,
    device: str,
    trackers: tuple[str, ...],
    work: Work,
) -> dict[str, Any]:
    """What TRL's config is made of."""
    aside = work.folder / "unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    wanted, recompute = work.runtime.micro_batch, work.runtime.activation_checkpointing
    at_once = min(1 if wanted == "auto" else wanted, options.prompts_per_step)
    while options.prompts_per_step % at_once:
        at_once -= 1
    group, _ = group_and_iterations(options)
    return {
        **online.settings(options),
        "output_dir": str(aside),
        "max_steps": total,
        "shuffle_dataset": False,
        "per_device_train_batch_size": at_once * group,
        "gradient_accumulation_steps": options.prompts_per_step // at_once,
        "learning_rate": config.learning_rate,
        "max_grad_norm": config.max_gradient_norm,
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "seed": config.seed,
        "use_cpu": device == "cpu",
        "disable_dropout": True,  # else what writes is drawn anew at every token, and is no model that learns
        "gradient_checkpointing": recompute not in ("auto", "none"),
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": list(trackers),
    }


def settings_of(online: objectives.Online, given: Mapping[str, Any]) -> Any:
    """TRL's config for its trainer, made of `arguments`."""
    made = getattr(importlib.import_module("trl"), online.trainer.replace("Trainer", "Config"))(**given)
    if made.n_gpu > 1:  # the first: all of them would be DataParallel, which TRL refuses
        made._n_gpu = 1
        # A reference model would be spread over all of them. TRL says that this is nothing to the model that it is
        # given, which is there already.
        made.model_init_kwargs = {"device_map": {"": 0}}
        trainer = getattr(importlib.import_module("trl"), online.trainer)
        logging.getLogger(trainer.__module__).addFilter(lambda told: "model_init_kwargs" not in told.getMessage())
    return made


def kind_of(online: objectives.Online, options: SampledOptions, seed: int, recorder: Recorder) -> type:
    """TRL's trainer; where nothing is rewarded, one that keeps the completions itself, and in an environment one that
    knows when an episode was cut off."""
    kind: type = getattr(importlib.import_module("trl"), online.trainer)
    if isinstance(options, RewardedOptions) and options.environment:
        return _cut_off_unanswered(kind)
    if isinstance(options, OnPolicyOptions):
        return teacher.sampling(kind, options.student_share, seed, recorder.keep)
    return kind


def _cut_off_unanswered(kind: type) -> type:
    """TRL's trainer `kind`, in which an episode also counts as cut off if nothing answered its last call: it was to go
    on, but there was no turn left, or no room for the answer. TRL drops such an answer and takes the call for the end.
    """

    class Trainer(kind):  # type: ignore[misc]
        def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
            prompt_ids, ids, own, episodes, *others = super()._generate(prompts)
            unanswered = [bool(episode[-1].get("tool_calls")) for episode in episodes]
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            cut = [call or written[-1] not in ends for call, written in zip(unanswered, ids, strict=True)]
            self._metrics["train"]["completions/clipped_ratio"][-1] = sum(cut) / len(cut)
            if self.mask_truncated_completions:
                own = [[0] * len(mask) if call else mask for call, mask in zip(unanswered, own, strict=True)]
            return prompt_ids, ids, own, episodes, *others

    return Trainer


def ours(kind: type, work: Work, recorder: Recorder) -> type:
    """A trainer with our checkpoints and names."""

    class Trainer(kind):  # type: ignore[misc]
        """Its checkpoints are complete or invisible, and its figures have our names."""

        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.saver = checkpoints.Saver(work.folder / "checkpoints", Path(self.args.output_dir))
            self.notes: list[str] = []
            """What a reader of the record should know: checkpoints that failed."""

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            entry = self.state.log_history[-1]
            if "loss" not in entry:
                return
            refuse_no_numbers(entry, self.model)
            for theirs, ours in MEASURES.items():
                if theirs in entry:
                    entry[ours] = entry[theirs]
            step = self.state.global_step
            told = {name: entry[name] for name in SHOWN if entry.get(name) is not None}
            work.tell(step, self.state.max_steps, "steps", learning_rate=entry["learning_rate"], **told)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            step, total, write_theirs = self.state.global_step, self.state.max_steps, super()._save_checkpoint

            def write(folder: Path) -> None:
                write_theirs(model, trial)  # into a folder of that very name
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                recorder.save(folder)

            self.saver.save(step, write, beside=False)
            for saved in self.saver.finished():
                if saved.path is None:
                    self.notes.append(saved.error)
                    work.tell(step, total, "steps", note=saved.error)
                else:
                    work.tell(step, total, "steps", checkpoint=saved.path.name)

    return Trainer


def refuse_no_numbers(entry: Mapping[str, float], model: torch.nn.Module) -> None:
    """Raise UserError when a step's loss is no number, or a weight after it: nothing good comes after that."""
    wrong = "" if math.isfinite(entry["loss"]) else f"the loss is {entry['loss']}"
    if not wrong and not torch.stack([weight.isfinite().all() for weight in weights.trained(model).values()]).all():
        wrong = f"weights are no numbers any more, at a gradient norm of {entry['grad_norm']:.3g}"
    if wrong:
        raise UserError(
            f"train: {wrong} after step {entry['step']}. Lower train.learning_rate or the rewards' weights, and see "
            "that no reward gives enormous numbers. Nothing of this step was kept"
        )


class Saving(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint every so many seconds, and for a last one when the training is to stop; both where the
    next step begins with completions of its own, because those of a batch are in no checkpoint."""

    def __init__(self, seconds: float, iterations: int, stop: threading.Event) -> None:
        self.seconds, self.iterations, self.stop, self.saved = seconds, iterations, stop, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step % self.iterations or state.global_step >= state.max_steps:
            return control
        asked = self.stop.is_set()
        if asked or time.monotonic() - self.saved >= self.seconds:
            control.should_save, control.should_training_stop = True, asked
            self.saved = time.monotonic()
        return control
