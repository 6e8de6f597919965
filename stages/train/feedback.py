"""What a model that trains on its own completions is asked, and what says how good they are: rewards, an environment,
features (`stages.train.features`) or a teacher (`stages.train.teacher`)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stages import objectives
from stages.errors import UserError
from stages.judge import Judge
from stages.objectives.ebft import EbftOptions
from stages.objectives.grpo import RewardedOptions, SampledOptions
from stages.stage import Facts, Work
from stages.train import TrainConfig, features, prompts, teacher
from stages.train.episodes import Episodes, template_in
from stages.train.rollouts import Recorder
from stages.turn_end import after_thought, answer_marks


def episodes_of(rewarded: RewardedOptions | None, inputs: Mapping[str, Path], tokenizer: Any) -> Episodes | None:
    """The recipe's environment, if it has one, with the chat template that the prompts went through."""
    if rewarded is None or rewarded.environment is None:
        return None
    tokenizer.chat_template = template_in(inputs["templates"])
    episodes = Episodes(rewarded.environment, tokenizer)
    if not episodes.weights and not rewarded.rewards:
        raise UserError("environment: its class has no `get_reward`, and the recipe names no rewards: add one")
    return episodes


def judge_of(options: RewardedOptions, inputs: Mapping[str, Path], work: Work) -> Judge:
    """What gives rewards, not yet running."""
    otherwise = 0.0 if options.on_error == "zero" else None
    folder = inputs.get("reward_models")
    return Judge(
        options.rewards,
        seconds=options.reward_seconds,
        workers=work.runtime.workers,
        otherwise=otherwise,
        models={place.name: place for place in folder.iterdir()} if folder else {},
    )


def asked(
    config: TrainConfig,
    objective: objectives.Objective,
    options: SampledOptions,
    inputs: Mapping[str, Path],
    work: Work,
    tokenizer: Any,
) -> tuple[list[prompts.Row], Facts]:
    """What the model is asked, in the plan's order, and what there is to tell about it."""
    rewarded = options if isinstance(options, RewardedOptions) else None
    rows = prompts.read(
        inputs,
        work,
        tokenizer,
        objective.kinds,
        rewarded.rewards if rewarded else {},
        options.max_new_tokens,
        messages=bool(rewarded and rewarded.environment),
    )
    if not isinstance(options, EbftOptions):
        return rows, {}
    places, left_out = features.anchored(rows, tokenizer, options, prompts.positions(inputs["model"]), config.seed)
    return places, {"places_left_out": left_out}


def given(
    config: TrainConfig,
    options: SampledOptions,
    inputs: Mapping[str, Path],
    trained: Any,
    tokenizer: Any,
    recorder: Recorder,
    episodes: Episodes | None,
    step: Callable[[], int],
) -> dict[str, Any]:
    """What TRL's trainer is given that says how good a completion is; `step` tells how many steps are done."""
    device = trained.device.type
    if isinstance(options, EbftOptions):
        frozen = features.Frozen(trained, inputs["model"], device)
        keep = partial(recorder.keep_with, "features", step)
        return {"reward_funcs": features.Matching(frozen, tokenizer, options, keep)}
    if isinstance(options, RewardedOptions):
        environment = {"environment_factory": episodes.kind} if episodes else {}
        template = prompts.template_of(inputs.get("templates"))
        mark = answer_marks(inputs["model"], template)[0] if template else ""
        said = partial(after_thought, tokenizer, mark=mark)
        return {"reward_funcs": recorder.functions(step, said, episodes), **environment}
    return {"teacher_model": teacher.load(config, inputs, device, trained)}


def judged(history: Sequence[Mapping[str, Any]], judge: Judge | None) -> Facts:
    """What rewards came to, of the steps in `history` that have one: not where a batch is trained on once more."""
    if not history:
        return {}
    told: Facts = {
        "unscored": dict(judge.unscored) if judge else {},
        "equal_groups": round(sum(entry["equal_groups"] for entry in history) / len(history), 4),
    }
    for measure in ("reward", "feature_loss"):
        if measure in history[0]:
            told |= {f"first_{measure}": history[0][measure], f"last_{measure}": history[-1][measure]}
    return told
