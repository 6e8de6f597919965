"""Training on completions: TRL's trainer over the plan's prompts, with rewards judged in processes of their own, in an
environment (`stages.train.episodes`), or with a teacher beside the model (`stages.train.teacher`).

Writes what packed training writes, and `rollouts.arrow`: every completion with its prompt, its step and its rewards.
"""

import json
import math
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
from transformers import PrinterCallback, set_seed

from stages import arithmetic, objectives, own_code
from stages.child import SUSPENDED
from stages.errors import UserError
from stages.judge import Judge
from stages.objectives.ebft import EbftOptions
from stages.objectives.grpo import RewardedOptions, SampledOptions
from stages.stage import Facts, Work
from stages.train import (
    TrainConfig,
    adapters,
    checkpoints,
    checks,
    features,
    model,
    online_trainer,
    optimizers,
    prompts,
    schedules,
    teacher,
    trackers,
    vllm_engine,
)
from stages.train.episodes import Episodes, template_in
from stages.train.rollouts import NAME as ROLLOUTS
from stages.train.rollouts import Recorder


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
    rewarded = options if isinstance(options, RewardedOptions) else None
    device = "cuda" if work.runtime.device != "cpu" and torch.cuda.is_available() else "cpu"
    if device != "cuda" and work.runtime.device == "cuda":
        raise UserError("the runtime asks for device cuda, but torch finds no CUDA device: use cpu or auto")
    checks.refuse_device(config, device)
    checks.refuse_ranks(config, work.runtime)
    reporting = trackers.chosen(work.runtime, work.folder.name)
    if config.own_code and not work.runtime.allow_code:
        raise own_code.not_allowed(config.own_code[0])
    if rewarded and rewarded.vllm:
        vllm_engine.refuse(device)
    config = config.model_copy(update={"precision": arithmetic.fitting(config.precision, device)})
    tokenizer = prompts.plain_tokenizer(inputs["model"])
    if objective.online.teacher:
        teacher.refuse(config, inputs)
    episodes = None
    if rewarded and rewarded.environment:
        tokenizer.chat_template = template_in(inputs["templates"])
        episodes = Episodes(rewarded.environment, tokenizer)
        if not episodes.weights and not rewarded.rewards:
            raise UserError("environment: its class has no `get_reward`, and the recipe names no rewards: add one")
    choices = rewarded.rewards if rewarded else {}
    room, again = options.max_new_tokens, episodes is not None
    rows = prompts.read(inputs, work, tokenizer, objective.kinds, choices, room, messages=again)
    left_out = 0
    if isinstance(options, EbftOptions):
        rows, left_out = features.anchored(rows, tokenizer, options, prompts.positions(inputs["model"]), config.seed)
    steps = -(-len(rows) // options.prompts_per_step)
    iterations = online_trainer.group_and_iterations(options)[1]
    total = config.max_steps or math.ceil(config.epochs * steps) * iterations
    asked = prompts.order(len(rows), -(-total // iterations) * options.prompts_per_step, config.seed)
    stop = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(_asked_by_sigterm(stop))
        judge = stack.enter_context(_judge(rewarded, inputs, work)) if rewarded else None
        set_seed(config.seed)
        trained = _load(config, inputs["model"], device)
        recorder = Recorder(judge, work.folder / "rollouts")
        given: dict[str, Any] = {"model": trained, "processing_class": tokenizer}
        if objective.online.teacher:
            given["teacher_model"] = teacher.load(config, inputs, device, trained)
        elif isinstance(options, EbftOptions):
            frozen = features.Frozen(trained, inputs["model"], device)
            given["reward_funcs"] = features.Matching(
                frozen,
                tokenizer,
                options,
                lambda *batch: recorder.keep_with("features", trainer.state.global_step, *batch),
            )
        else:
            given["reward_funcs"] = recorder.functions(lambda: trainer.state.global_step, episodes)
        arguments = online_trainer.arguments(config, options, objective.online, total, device, reporting, work)
        if episodes:
            given["environment_factory"] = episodes.kind
            arguments["reward_weights"] += episodes.weights
        if rewarded and rewarded.vllm:
            arguments |= vllm_engine.arguments(rewarded, rows, tokenizer, work.runtime)
        optimizer = optimizers.make(trained, config)
        kind = online_trainer.kind_of(objective.online, options, config.seed, recorder)
        trainer = online_trainer.ours(kind, work, recorder)(
            args=online_trainer.settings_of(objective.online, arguments),
            train_dataset=Dataset.from_list([rows[i] for i in asked]),
            optimizers=(optimizer, LambdaLR(optimizer, schedules.multiplier(config, total))),
            **given,
        )
        if rewarded and rewarded.vllm:
            vllm_engine.adjust(trainer, rewarded, [rows[i]["prompt"] for i in asked])
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
                    f"train: the device's memory does not hold {at_once} completions at once. They are those of "
                    "REGROW_MICRO_BATCH prompts: set that lower, or REGROW_ACTIVATION_CHECKPOINTING=full"
                ) from error
        if trainer.state.global_step < total:
            raise SystemExit(SUSPENDED)
        done = time.monotonic()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        _write(config, trained, history, inputs["model"], output)
        written = recorder.write(output / ROLLOUTS)
    facts = {
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
    }
    judged = [entry for entry in history if "reward" in entry]  # not where a batch is trained on once more
    if isinstance(options, EbftOptions):
        facts |= {"places_left_out": left_out}
        facts |= {f"{name}_feature_loss": judged[at]["feature_loss"] for name, at in (("first", 0), ("last", -1))}
    if not judged:
        return facts
    return facts | {
        "unscored": dict(judge.unscored) if judge else {},
        "first_reward": judged[0]["reward"],
        "last_reward": judged[-1]["reward"],
        "equal_groups": round(sum(entry["equal_groups"] for entry in judged) / len(judged), 4),
    }


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
    named = ("step", "loss", "learning_rate", "grad_norm", *online_trainer.MEASURES.values())
    lines = [json.dumps({name: entry[name] for name in named if entry.get(name) is not None}) for entry in history]
    (output / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    told = {"method": config.method, "objective": config.objective, "steps": len(lines)}
    (output / "train.json").write_text(json.dumps(told, indent=2) + "\n")
