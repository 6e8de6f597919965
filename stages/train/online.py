"""Training on completions: TRL's trainer over the plan's prompts, with rewards judged in processes of their own, or
with a teacher beside the model (`stages.train.teacher`).

Writes what packed training writes, and `rollouts.arrow`: every completion with its prompt, its step and its rewards.
"""

import importlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback, set_seed

from stages import arithmetic, objectives
from stages.child import SUSPENDED
from stages.errors import UserError
from stages.judge import Judge
from stages.objectives.grpo import RewardedOptions, SampledOptions
from stages.objectives.on_policy_distillation import OnPolicyOptions
from stages.stage import Facts, Work
from stages.train import TrainConfig, adapters, checkpoints, checks, model, optimizers, prompts, schedules, teacher
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
}
"""TRL's names to ours. `equal_groups` is the share of prompts whose completions all got the same reward: nothing is
learned from those. `cut_off` is the share of completions that reached the most tokens."""


def train(config: TrainConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Train `inputs["model"]` on completions of its own to the prompts in `inputs["plan"]`.

    An objective with a teacher also reads `inputs["teacher"]`. Writes `adapter/` or `weights/`, `metrics.jsonl`,
    `train.json` and `rollouts.arrow`. Goes on from the newest checkpoint in `work.folder`. Raises UserError for what a
    user can mend, and SystemExit(75) after SIGTERM.
    """
    started = time.monotonic()
    objective = objectives.find(config.objective)
    assert objective.online is not None
    options = objectives.options_of(config.objective, config.objective_options)
    assert isinstance(options, SampledOptions)
    choices = options.rewards if isinstance(options, RewardedOptions) else {}
    if any(choice.code for choice in choices.values()) and not work.runtime.allow_code:
        raise UserError(
            "train.objective_options.rewards names a Python file: it runs with all your rights, so say that it may: "
            "`--allow-code` or REGROW_ALLOW_CODE=1"
        )
    device = "cuda" if work.runtime.device != "cpu" and torch.cuda.is_available() else "cpu"
    if device != "cuda" and work.runtime.device == "cuda":
        raise UserError("the runtime asks for device cuda, but torch finds no CUDA device: use cpu or auto")
    checks.refuse_device(config, device)
    config = config.model_copy(update={"precision": arithmetic.fitting(config.precision, device)})
    tokenizer = prompts.plain_tokenizer(inputs["model"])
    if objective.online.teacher:
        teacher.refuse(config, inputs)
    rows = prompts.read(inputs, work, tokenizer, objective.kinds, choices)
    steps = -(-len(rows) // options.prompts_per_step)
    iterations = _group_and_iterations(options)[1]
    total = config.max_steps or math.ceil(config.epochs * steps) * iterations
    asked = prompts.order(len(rows), -(-total // iterations) * options.prompts_per_step, config.seed)
    stop = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(_asked_by_sigterm(stop))
        judge = stack.enter_context(_judge(options, inputs, work)) if isinstance(options, RewardedOptions) else None
        set_seed(config.seed)
        trained = _load(config, inputs["model"], device)
        recorder = Recorder(judge, work.folder / "rollouts")
        given: dict[str, Any] = {"model": trained, "processing_class": tokenizer}
        if objective.online.teacher:
            given["teacher_model"] = teacher.load(config, inputs, device, trained)
        else:
            given["reward_funcs"] = recorder.functions(lambda: trainer.state.global_step)
        arguments = _arguments(config, options, objective.online, total, device, work)
        optimizer = optimizers.make(trained, config)
        kind = _kind(objective.online, options, config.seed, recorder)
        trainer = _ours(kind, work)(
            args=arguments,
            train_dataset=Dataset.from_list([rows[i] for i in asked]),
            optimizers=(optimizer, LambdaLR(optimizer, schedules.multiplier(config, total))),
            **given,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Saving(work.runtime.save_seconds, stop))
        checkpoint, skipped = checkpoints.newest(work.folder / "checkpoints")
        resumed = int(checkpoint.name) if checkpoint else 0
        recorder.forget_after(resumed)
        work.tell(resumed, total, "steps")
        ready = time.monotonic()
        if not stop.is_set():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < total:
            raise SystemExit(SUSPENDED)
        done = time.monotonic()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        _write(config, trained, history, inputs["model"], output)
        written = recorder.write(output / "rollouts.arrow")
    facts = {
        "steps": len(history),
        "resumed_at_step": resumed,
        "skipped_checkpoints": list(skipped),
        "prompts": len(rows),
        "completions": written,
        "trained_weights": model.trainable(trained),
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        "device": device,
        "precision": config.precision,
        "seconds_to_prepare": round(ready - started, 2),
        "seconds_of_training": round(done - ready, 2),
        "completions_per_second": round(written / (done - ready), 2),
    }
    if judge is None:
        return facts
    return facts | {
        "unscored": dict(judge.unscored),
        "first_reward": history[0]["reward"],
        "last_reward": history[-1]["reward"],
        "equal_groups": round(sum(entry["equal_groups"] for entry in history) / len(history), 4),
    }


def _group_and_iterations(options: SampledOptions) -> tuple[int, int]:
    """Completions to each prompt, and how often each batch of them is trained on."""
    return (options.group_size, options.iterations) if isinstance(options, RewardedOptions) else (1, 1)


def _judge(options: RewardedOptions, inputs: Mapping[str, Path], work: Work) -> Judge:
    otherwise = 0.0 if options.on_error == "zero" else None
    folder = inputs.get("reward_models")
    return Judge(
        options.rewards,
        seconds=options.reward_seconds,
        workers=work.runtime.workers,
        otherwise=otherwise,
        models={place.name: place for place in folder.iterdir()} if folder else {},
    )


def _load(config: TrainConfig, folder: Path, device: str) -> Any:
    """The model as it starts, with attention that can generate."""
    from stages.generation import load_network

    frozen = config.method == "lora" and config.precision == "bf16"
    network = load_network(folder, "bf16" if frozen else "fp32", "cuda" if device == "cuda" else "cpu", packed=False)
    network.train()
    if config.method == "full":
        return network
    adapted = adapters.adapt(network, config.lora, folder)
    adapters.lift_inputs(adapted)  # TRL generates without autocast
    return adapted


def _arguments(
    config: TrainConfig, options: SampledOptions, online: objectives.Online, total: int, device: str, work: Work
) -> Any:
    """TRL's config."""
    aside = work.folder / "unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    wanted, recompute = work.runtime.micro_batch, work.runtime.activation_checkpointing
    at_once = min(1 if wanted == "auto" else wanted, options.prompts_per_step)
    while options.prompts_per_step % at_once:
        at_once -= 1
    group, _ = _group_and_iterations(options)
    kind = getattr(importlib.import_module("trl"), online.trainer.replace("Trainer", "Config"))
    return kind(
        **online.settings(options),
        output_dir=str(aside),
        max_steps=total,
        shuffle_dataset=False,
        per_device_train_batch_size=at_once * group,
        gradient_accumulation_steps=options.prompts_per_step // at_once,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_gradient_norm,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        seed=config.seed,
        use_cpu=device == "cpu",
        gradient_checkpointing=recompute not in ("auto", "none"),
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
    )


def _kind(online: objectives.Online, options: SampledOptions, seed: int, recorder: Recorder) -> type:
    """TRL's trainer; where nothing is rewarded, one that keeps the completions itself."""
    kind: type = getattr(importlib.import_module("trl"), online.trainer)
    if isinstance(options, OnPolicyOptions):
        return teacher.sampling(kind, options.student_share, seed, recorder.keep)
    return kind


def _ours(kind: type, work: Work) -> type:
    """A trainer with our checkpoints and names."""

    class Trainer(kind):  # type: ignore[misc]
        """Its checkpoints are complete or invisible, and its figures have our names."""

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            entry = self.state.log_history[-1]
            if "loss" not in entry:
                return
            for theirs, ours in MEASURES.items():
                if theirs in entry:
                    entry[ours] = entry[theirs]
            step = self.state.global_step
            shown = ("loss", "reward", "equal_groups", "completion_length")
            told = {name: entry[name] for name in shown if name in entry}
            work.tell(step, self.state.max_steps, "steps", learning_rate=entry["learning_rate"], **told)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            step = self.state.global_step
            folder = Path(self.args.output_dir) / f"checkpoint-{step}"
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            saved = checkpoints.publish(folder, work.folder / "checkpoints", step)
            work.tell(step, self.state.max_steps, "steps", checkpoint=saved.name)

    return Trainer


@contextmanager
def _asked_by_sigterm(stop: threading.Event) -> Iterator[None]:
    """Turn SIGTERM into a wish to stop while the block runs. Outside the main thread there is nobody to signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Saving(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint every so many seconds, and for a last one when the training is to stop."""

    def __init__(self, seconds: float, stop: threading.Event) -> None:
        self.seconds, self.stop, self.saved = seconds, stop, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        asked = self.stop.is_set()
        if state.global_step < state.max_steps and (asked or time.monotonic() - self.saved >= self.seconds):
            control.should_save, control.should_training_stop = True, asked
            self.saved = time.monotonic()
        return control


def _write(config: TrainConfig, trained: Any, history: Sequence[Mapping[str, Any]], source: Path, output: Path) -> None:
    if config.method == "lora":
        adapters.save(trained, output / "adapter")
    else:
        model.save_weights(trained, source, output / "weights")
    named = ("step", "loss", "learning_rate", "grad_norm", *MEASURES.values())
    lines = [json.dumps({name: entry[name] for name in named if entry.get(name) is not None}) for entry in history]
    (output / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    told = {"method": config.method, "objective": config.objective, "steps": len(lines)}
    (output / "train.json").write_text(json.dumps(told, indent=2) + "\n")
