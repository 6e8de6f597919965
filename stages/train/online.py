"""Training on completions: TRL's trainer over the plan's prompts; what says how good a completion is comes from
`stages.train.feedback`.

Writes what packed training writes, and `rollouts.arrow`: every completion with its prompt, its step and its rewards.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, set_seed

from stages import arithmetic, objectives, own_code
from stages.child import SUSPENDED
from stages.errors import UserError
from stages.generation_settings import keep_tokens
from stages.objectives.grpo import RewardedOptions, SampledOptions
from stages.stage import Facts, Work
from stages.train import (
    TrainConfig,
    adapters,
    checkpoints,
    checks,
    feedback,
    model,
    online_trainer,
    optimizers,
    prompts,
    schedules,
    teacher,
    trackers,
    vllm_engine,
)
from stages.train.rollouts import NAME as ROLLOUTS
from stages.train.rollouts import Recorder
from stages.train.schedules import steps_in


def train(config: TrainConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Train `inputs["model"]` on completions of its own to the prompts in `inputs["plan"]`.

    An objective with a teacher also reads `inputs["teacher"]`. Writes `adapter/` or `weights/`, `metrics.jsonl`,
    `train.json` and `rollouts.arrow`. Goes on from the newest checkpoint in `work.folder`. Raises UserError for what a
    user can mend, and SystemExit(75) after SIGTERM.
    """
    started = time.monotonic()
    objective = objectives.find(config.objective)
    online = objective.online
    assert online is not None
    options = objectives.options_of(config.objective, config.objective_options)
    assert isinstance(options, SampledOptions)
    rewarded = options if isinstance(options, RewardedOptions) else None
    device = "cuda" if work.runtime.device != "cpu" and torch.cuda.is_available() else "cpu"
    reporting = trackers.chosen(work.runtime, work.folder.name)
    _refuse(config, online, rewarded, inputs, work, device)
    config = config.model_copy(update={"precision": arithmetic.fitting(config.precision, device)})
    tokenizer = prompts.plain_tokenizer(inputs["model"], inputs.get("templates"))
    episodes = feedback.episodes_of(rewarded, inputs, tokenizer)
    rows, counted = feedback.asked(config, objective, options, inputs, work, tokenizer)
    steps = -(-len(rows) // options.prompts_per_step)
    iterations = online_trainer.group_and_iterations(options)[1]
    total = config.max_steps or steps_in(config.epochs, steps) * iterations
    asked = [rows[i] for i in prompts.order(len(rows), -(-total // iterations) * options.prompts_per_step, config.seed)]
    stop = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(_asked_by_sigterm(stop))
        judge = stack.enter_context(feedback.judge_of(rewarded, inputs, work)) if rewarded else None
        set_seed(config.seed)
        trained = _load(config, inputs["model"], device)
        recorder = Recorder(judge, work.folder / "rollouts")
        arguments = online_trainer.arguments(config, options, online, total, device, reporting, work)
        if episodes:
            arguments["reward_weights"] += episodes.weights
        if rewarded and rewarded.vllm:
            arguments |= vllm_engine.arguments(rewarded, rows, tokenizer, work.runtime)
        optimizer = optimizers.make(trained, config)
        kind = online_trainer.kind_of(online, options, config.seed, recorder)
        trainer = online_trainer.ours(kind, work, recorder)(
            model=trained,
            processing_class=tokenizer,
            args=online_trainer.settings_of(online, arguments),
            train_dataset=Dataset.from_list(asked),
            optimizers=(optimizer, LambdaLR(optimizer, schedules.multiplier(config, total))),
            **feedback.given(
                config, options, inputs, trained, tokenizer, recorder, episodes, lambda: trainer.state.global_step
            ),
        )
        if rewarded and rewarded.vllm:
            vllm_engine.adjust(trainer, rewarded, [row["prompt"] for row in asked])
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(online_trainer.Saving(work.runtime.save_seconds, iterations, stop))
        checkpoint, skipped = checkpoints.newest(work.folder / "checkpoints")
        resumed = int(checkpoint.name) if checkpoint else 0
        earlier = recorder.go_on(checkpoint)
        work.tell(resumed, total, "steps")
        ready = time.monotonic()
        if not stop.is_set():
            try:
                with optimizers.training(trainer.optimizer):
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except torch.OutOfMemoryError as error:
                at_once = arguments["per_device_train_batch_size"]
                raise UserError(
                    f"train: the device's memory does not hold {at_once} completions at once while it learns, those of "
                    "REGROW_MICRO_BATCH prompts, or all of a step's while it writes them. For the one set "
                    "REGROW_MICRO_BATCH lower, or REGROW_ACTIVATION_CHECKPOINTING=full; for the other "
                    "train.objective_options.max_new_tokens, group_size or prompts_per_step"
                ) from error
        if trainer.state.global_step < total:
            raise SystemExit(SUSPENDED)
        done = time.monotonic()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        _write(config, trained, history, inputs["model"], output)
        written = recorder.write(output / ROLLOUTS)
    return {
        "steps": len(history),
        "resumed_at_step": resumed,
        "skipped_checkpoints": list(skipped),
        "notes": trainer.notes,
        "prompts": len(rows),
        "completions": written,
        "trained_weights": model.trainable(trained),
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        "device": device,
        "precision": config.precision,
        "seconds_to_prepare": round(ready - started, 2),
        "seconds_of_training": round(done - ready, 2),
        "completions_per_second": round((written - earlier) / (done - ready), 2),
        **counted,
        **feedback.judged([entry for entry in history if "reward" in entry], judge),
    }


def _refuse(
    config: TrainConfig,
    online: objectives.Online,
    rewarded: RewardedOptions | None,
    inputs: Mapping[str, Path],
    work: Work,
    device: str,
) -> None:
    """Raise UserError for what can be seen before anything is read."""
    if device != "cuda" and work.runtime.device == "cuda":
        raise UserError("the runtime asks for device cuda, but torch finds no CUDA device: use cpu or auto")
    checks.refuse_device(config, device)
    checks.refuse_ranks(config, work.runtime)
    if config.own_code and not work.runtime.allow_code:
        raise own_code.not_allowed(config.own_code[0])
    if rewarded and rewarded.vllm:
        vllm_engine.refuse(device)
    if online.teacher:
        teacher.refuse(config, inputs)


def _load(config: TrainConfig, folder: Path, device: str) -> Any:
    """The model as it starts, with attention that can generate. Raises UserError for an adapter that TRL's losses would
    not see."""
    from stages.generation import load_network

    frozen = config.method == "lora" and config.precision == "bf16"
    network = load_network(folder, "bf16" if frozen else "fp32", "cuda" if device == "cuda" else "cpu", packed=False)
    keep_tokens(network)
    network.train()
    if config.method == "full":
        return network
    adapted = adapters.adapt(network, config.lora, folder)
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer | TrainableTokensWrapper):
        raise UserError(
            f"train: {config.objective} reads the weights of lm_head themselves, past an adapter that stands there: "
            "take it out of train.lora.targets and new_tokens"
        )
    adapters.lift_inputs(adapted)  # TRL generates without autocast
    return adapted


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


def _write(config: TrainConfig, trained: Any, history: Sequence[Mapping[str, Any]], source: Path, output: Path) -> None:
    if config.method == "lora":
        adapters.save(trained, output / "adapter")
    else:
        model.save_weights(trained, source, output / "weights")
        if not (source / "generation_config.json").exists():
            (output / "weights/generation_config.json").unlink()  # ours, see `keep_tokens`
    named = ("step", "loss", "learning_rate", "grad_norm", *online_trainer.MEASURES.values())
    lines = [json.dumps({name: entry[name] for name in named if entry.get(name) is not None}) for entry in history]
    (output / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    told = {"method": config.method, "objective": config.objective, "steps": len(lines)}
    (output / "train.json").write_text(json.dumps(told, indent=2) + "\n")
