"""Scoring one model with lm-eval: on rows of our own, or on a task that lm-eval ships.

Rows of our own become a task of lm-eval: a YAML file beside a Parquet file, exact match on generated text. Parquet,
because JSON readers guess types, and a target such as 2024-01-01 must stay text.
"""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.evals import Options
from stages.generation import Model
from stages.identity import Json

SEED = 0
"""Of Python's, numpy's and torch's generators and of lm-eval's choice of few-shot examples."""

OWN_TASK = "rows"

UNFILTERED = "none"
"""lm-eval's name for a task's answers when it extracts nothing from them."""

Answered = Callable[[int, int], None]
"""Hears how many requests are done, and of how many."""


@dataclass(frozen=True)
class Sample:
    """One item that lm-eval asked and scored."""

    task: str
    """Name of the leaf task: a group such as `mmlu` has many."""
    item: int
    question: str
    target: str
    answer: str
    metric: str
    score: float


def require() -> None:
    """Raise UserError when lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("evaluate.tasks needs lm-eval, which is not installed: pip install 'regrow[evaluate]'")


def check_names(names: Sequence[str]) -> None:
    """Raise UserError, with the nearest names, for a task that lm-eval does not ship. Reads its index: some seconds."""
    if not names:
        return
    require()
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for name in names:
        _refuse_unknown(name, known)


def _refuse_unknown(name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = ", ".join(get_close_matches(name, known, 3, cutoff=0.5)) or "none is near"
        raise UserError(f"evaluate.tasks: lm-eval has no task {name!r}. Nearest names: {near}")


def exact_match(
    model: Model,
    prompts: Sequence[str],
    targets: Sequence[str],
    options: Options,
    max_new_tokens: int,
    stop: Sequence[str],
    batch: int,
    folder: Path,
    answered: Answered,
) -> list[Sample]:
    """lm-eval's exact match on our own items, in their order; `prompts` stand as the model reads them. `folder`
    receives the task's two files."""
    require()
    # Else the datasets library reports the reading of a local file to a server. It looks when it is imported.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    from lm_eval.tasks import TaskManager

    _write_task(folder, prompts, targets, options, max_new_tokens, stop)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return _samples(model, manager, OWN_TASK, "exact_match", batch, answered, rendered=True)[0]


def _write_task(
    folder: Path,
    prompts: Sequence[str],
    targets: Sequence[str],
    options: Options,
    max_new_tokens: int,
    stop: Sequence[str],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    fold = str.lower if options.ignore_case else str
    columns = {"prompt": list(prompts), "target": [fold(target) for target in targets]}
    rows = folder / "rows.parquet"
    pa.parquet.write_table(pa.table(columns), rows)
    task = task_document(str(rows), str(folder / "datasets"), options, max_new_tokens, stop)
    (folder / "rows.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def task_document(rows: str, cache: str, options: Options, max_new_tokens: int, stop: Sequence[str]) -> dict[str, Json]:
    """lm-eval's task over a Parquet file with the columns prompt and target (in lower case to ignore case)."""
    # lm-eval's own ignore_case and ignore_punctuation run after the patterns, so white space next to punctuation would
    # stay, and they cut off what grows when lowered (İ); a filter and patterns of ours say the same without that.
    patterns = ["\0", *([r"[!-/:-@\[-`{-~]"] if options.ignore_punctuation else []), r"^\s+|\s+$"]
    lower = [{"function": "lowercase"}] if options.ignore_case else []
    return {
        "task": OWN_TASK,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": rows}, "cache_dir": cache},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "generation_kwargs": {"until": list(stop), "do_sample": False, "max_gen_toks": max_new_tokens},
        "filter_list": [{"name": UNFILTERED, "filter": [*lower, {"function": "take_first"}]}],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": False,
                "ignore_punctuation": False,
                "regexes_to_ignore": patterns,
            }
        ],
    }


def shipped(
    model: Model,
    name: str,
    metric: str,
    few_shot: int | None,
    limit: int | None,
    system: str,
    batch: int,
    answered: Answered,
) -> tuple[list[Sample], int]:
    """A task or group that lm-eval ships, by name; `metric` "" takes each task's first one with a number an item of
    which more is better, `system` "" no system prompt. Also how many questions, with the examples before them, lost
    their beginning.

    Raises UserError for an unknown name or metric, one of which less is better, and when the task's data cannot be had.
    """
    require()
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    _refuse_unknown(name, manager.all_tasks)
    return _samples(model, manager, name, metric, batch, answered, few_shot=few_shot, limit=limit, system=system)


def _samples(
    model: Model,
    manager: Any,
    name: str,
    metric: str,
    batch: int,
    answered: Answered,
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    system: str = "",
    rendered: bool = False,
) -> tuple[list[Sample], int]:
    """The samples, and how many questions lose their beginning. `rendered`: the task's texts went through the chat
    template already."""
    import lm_eval
    import numpy as np
    import torch

    try:
        found = manager.load([name])
    except Exception as error:  # it builds the data set: whatever the Hub, the network or its script raises
        raise UserError(
            f"evaluate.tasks: lm-eval's task {name!r} does not load ({type(error).__name__}: {error}). Most of its "
            "tasks download their data: check the network, or ask for rows of your own with `source:`"
        ) from error
    for leaf, task in found["tasks"].items():
        _refuse_falling(leaf, metric, task.higher_is_better())
        if few_shot is not None:
            task.set_config(key="num_fewshot", value=few_shot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    asked = _language_model(model, batch, answered)
    results = lm_eval.evaluate(
        lm=asked,
        task_dict=found,
        bootstrap_iters=0,
        log_samples=True,
        limit=limit,
        system_instruction=system or None,
        apply_chat_template=model.chats and not rendered,
        fewshot_as_multiturn=model.chats,
    )
    rising = {task: _rising(told) for task, told in results["higher_is_better"].items()}
    logged = sorted(results["samples"].items())
    return [sample for task, items in logged for sample in _chosen(task, items, metric, rising[task])], len(asked.cut)


def _rising(told: Mapping[str, bool | None]) -> list[str]:
    """Those of a task's metrics of which more is better, as far as lm-eval knows."""
    return [metric for metric, more in told.items() if more is not False]


def _refuse_falling(task: str, metric: str, told: Mapping[str, bool | None]) -> None:
    """Raise UserError where a metric, or all that a task has, are the less the better: scores are compared, and gates
    pass, by more."""
    rising = _rising(told)
    if metric in told and metric not in rising:
        others = f"name another one: {', '.join(rising)}" if rising else "and it has no other: take the task out"
        raise UserError(f"evaluate.tasks: of {task}'s metric {metric!r} less is better, and a score is more: {others}")
    if told and not rising:
        raise UserError(
            f"evaluate.tasks: of all metrics of {task} less is better, and a score is more: {', '.join(told)}. Take "
            "the task out"
        )


def _language_model(model: Model, batch: int, answered: Answered) -> Any:
    """lm-eval's wrapper of a transformers model, with a count of finished requests, and of questions that it cuts."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):  # type: ignore[misc]
        """Counts where HFLM has one place a batch passes through, whatever its kind."""

        done = total = 0

        def __init__(self, **given: Any) -> None:
            self.cut: set[Any] = set()
            """Questions that are longer than the model's context."""
            self.ends: list[int] = []
            """Tokens that end the answers that are being made."""
            super().__init__(**given)

        def tok_batch_encode(
            self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **kwargs: Any
        ) -> Any:
            encoded = {"input_ids": [model.encode(text) for text in strings]}
            padded = model.tokenizer.pad(encoded, padding_side="left", return_tensors="pt")
            ids, mask = padded["input_ids"], padded["attention_mask"]
            if left_truncate_len is None:
                return ids, mask
            lengths = mask.sum(1).tolist()
            self.cut |= {text for text, size in zip(strings, lengths, strict=True) if size > left_truncate_len}
            return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            # lm-eval's own leaves the system prompt out where the template refuses it, and asks the clock for the date.
            return model.render(chat_history, begun=not add_generation_prompt)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            self.total += len(requests)
            return list(super().generate_until(requests, disable_tqdm=True))

        def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            self.total += len(requests)
            most = self.max_length + 1
            self.cut |= {tuple(before) for _, before, after in requests if len(before) + len(after) > most}
            found = super()._loglikelihood_tokens(requests, *args, **{**kwargs, "disable_tqdm": True})
            self._count(self.total - self.done)  # requests with one context share a forward pass
            return found

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
            return model.answer(tokens, self.ends) if skip_special_tokens else super().tok_decode(tokens, False)

        def _model_generate(self, context: Any, *args: Any, stop: list[str], **kwargs: Any) -> Any:
            self.ends = model.ends(stop)
            # What stops an answer may well stand in the reasoning before it.
            stop = [] if model.thought_end else stop
            made = super()._model_generate(context, *args, stop=stop, eos_token_id=self.ends or None, **kwargs)
            self._count(len(context))
            return made

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self._count(len(inps))
            return logits

        def _count(self, batch: int) -> None:
            self.done = min(self.total, self.done + batch)
            answered(self.done, self.total)

    # A chat template writes the begin token where it wants one; with None, lm-eval puts one before it all the same.
    begin = False if model.chats else None
    return Counting(pretrained=model.network, tokenizer=model.tokenizer, batch_size=batch, add_bos_token=begin)


def _chosen(task: str, logged: Sequence[Mapping[str, Json]], metric: str, rising: Sequence[str]) -> list[Sample]:
    """One sample an item: lm-eval logs one a filter, and the task's first filter counts. Of the `rising` metrics more
    is better."""
    first = logged[0]
    numeric = [m for m in first["metrics"] if isinstance(first[m], int | float) and m in rising]
    if metric and metric not in numeric:
        raise UserError(f"evaluate.tasks: {task} has no metric {metric!r} with a number an item, but {numeric}")
    if not numeric:
        raise UserError(f"evaluate.tasks: {task} has no metric with a number an item, only {first['metrics']}")
    name = metric or numeric[0]
    return sorted(
        (
            Sample(
                task=task,
                item=int(sample["doc_id"]),
                question=str(sample["arguments"][0][0]),
                target=str(sample["target"]),
                answer=str(sample["resps"][0][0] if sample["filter"] == UNFILTERED else sample["filtered_resps"][0]),
                metric=name,
                score=float(sample[name]),
            )
            for sample in logged
            if sample["filter"] == first["filter"]
        ),
        key=lambda sample: sample.item,
    )
