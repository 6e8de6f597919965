"""vLLM as the writer of completions, through TRL's trainers: what must hold, and TRL's arguments for it."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from stages.errors import UserError
from stages.objectives.grpo import RewardedOptions
from stages.runtime import Runtime
from stages.train.ahead import Ahead, Prompts
from stages.train.vllm_weights import Told

SHARE = 0.3
"""Of the GPU's memory, where the recipe does not say how much."""


def refuse(device: str) -> None:
    """Raise UserError where it cannot run."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("train.objective_options.vllm needs vLLM, which is not installed: pip install 'regrow[vllm]'")
    if device != "cuda":
        raise UserError("train.objective_options.vllm needs a GPU: take it out, and the model itself writes on the CPU")


def arguments(
    options: RewardedOptions, prompts: Sequence[Mapping[str, Any]], tokenizer: Any, runtime: Runtime
) -> dict[str, Any]:
    """TRL's arguments, for a recipe that asks for it and the prompts it will be asked."""
    choice = options.vllm
    assert choice is not None
    # TRL's own choice weighs whole completions, and leaves out those that have become three times as probable: a batch
    # later those are many. vespo weighs tokens itself, and TRL asks for a correction by tokens beside it.
    by_tokens = choice.asynchronous or getattr(options, "loss", "") == "vespo"
    correction = {"vllm_importance_sampling_mode": "token_truncate"} if by_tokens else {}
    # vLLM stops where the model's own files say, which is not where a turn of another chat template ends.
    ends = {"generation_kwargs": {"stop_token_ids": [tokenizer.eos_token_id]}}
    if choice.mode == "server":
        where = {"vllm_server_base_url": runtime.vllm_url}
        return {"use_vllm": True, "vllm_mode": "server", **ends, **where, **correction}
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    length = None  # the model's own, in an environment: prompts grow there by tools and by what reset adds
    if not options.environment:
        length = max(len(tokenizer(row["prompt"])["input_ids"]) for row in prompts) + options.max_new_tokens
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": choice.memory or SHARE,
        "vllm_enable_sleep_mode": choice.sleep,
        "vllm_max_model_length": length,
        **ends,
        **correction,
    }


def adjust(trainer: Any, options: RewardedOptions, prompts: Sequence[Any]) -> None:
    """Let TRL's trainer tell vLLM the right weights and, if the recipe says so, ask it a step ahead. `prompts` are all
    in the order they are asked."""
    assert options.vllm is not None
    trainer.vllm_generation.model = Told(trainer.model)
    if options.vllm.asynchronous:
        trainer.vllm_generation = Ahead(trainer.vllm_generation, lambda: _following(trainer, options, prompts))


def _following(trainer: Any, options: RewardedOptions, prompts: Sequence[Any]) -> Prompts | None:
    """The token ids of the batch after the one that the trainer is at."""
    start = (trainer.state.global_step // options.iterations + 1) * options.prompts_per_step
    asked = list(prompts[start : start + options.prompts_per_step])
    if not asked:
        return None
    return [ids for ids in trainer.processing_class(text=asked)["input_ids"] for _ in range(options.group_size)]
