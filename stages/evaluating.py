"""What one part of evaluate does: ask a model, or measure its held-out loss. See `stages.evaluate`.

evaluate(measure, inputs, output, work)     # writes scores.json and, for a task, samples.jsonl
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from stages import evals, harness, reward_models
from stages.compare import OTHER_TOKENIZER
from stages.errors import UserError
from stages.evaluate import EXACT_MATCH, Measure, Task, all_rows
from stages.generation import Model, Turn, cut, generate, load
from stages.harness import Sample
from stages.identity import Json
from stages.stage import Facts, Work

__all__ = ["evaluate"]


def evaluate(config: Measure, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Score one model on one task, or measure its held-out loss."""
    started = time.monotonic()
    if config.task is None:
        facts = _measure_loss(config, inputs, output, work)
    elif config.task.reward_model:
        facts = _write(output, *_judged(config, config.task, inputs, work))
    elif config.task.eval:
        facts = _write(output, *_ask(config, config.task, inputs, work))
    elif config.task.source:
        facts = _write(output, *_ask_through_harness(config, config.task, inputs, work))
    else:
        model = _model(config, inputs, work)
        task = config.task
        samples, lost = harness.shipped(
            model,
            task.lm_eval,
            task.metric,
            task.few_shot,
            task.limit,
            task.system,
            work.runtime.eval_batch,
            _items(work),
        )
        facts = _write(output, samples, {"cut_questions": lost})
    return {**facts, "seconds": round(time.monotonic() - started, 3)}


def _model(config: Measure, inputs: Mapping[str, Path], work: Work) -> Model:
    return replace(load(inputs["weights"], config.precision, work.runtime.device), today=config.date)


def _measure_loss(config: Measure, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    from stages.heldout import measure, same_tokens

    if "tokenizer" in inputs and not same_tokens(inputs["weights"], inputs["tokenizer"], inputs["plan"]):
        (output / "scores.json").write_text(json.dumps({OTHER_TOKENIZER: True}))
        return {"heldout_tokens": 0}
    found = measure(
        inputs["weights"],
        inputs["plan"],
        config.precision,
        work.runtime,
        lambda done, total: work.tell(done, total, "sequences"),
    )
    more = {"margins": found.margins, "groups": found.groups, "behind": found.behind}
    document = {"sums": found.sums, "tokens": found.tokens, **{name: each for name, each in more.items() if each}}
    if found.samples:
        _write(output, found.samples, document)
    else:
        (output / "scores.json").write_text(json.dumps(document))
    return {"heldout_tokens": sum(found.tokens), **({"heldout_items": len(found.samples)} if found.samples else {})}


def _ask(config: Measure, task: Task, inputs: Mapping[str, Path], work: Work) -> tuple[list[Sample], dict[str, Json]]:
    """An eval of our own: its examples, answered through plain transformers, scored by it."""
    chosen = evals.load(task.eval)
    examples = chosen.examples(_read(inputs["rows"], task), task.options)
    turns = [task.asked(example.turns) for example in examples]
    answers, told = _answers(config, task, turns, inputs, work)
    samples = [
        Sample("", i, evals.shown(asked), e.target, answer, task.eval, chosen.score(e, answer, task.options))
        for i, (asked, e, answer) in enumerate(zip(turns, examples, answers, strict=True))
    ]
    return samples, told


def _judged(
    config: Measure, task: Task, inputs: Mapping[str, Path], work: Work
) -> tuple[list[Sample], dict[str, Json]]:
    """Answers to conversations, and what the reward model says that they are worth."""
    from transformers import AutoTokenizer

    folder, name = inputs["reward_model"], task.reward_model
    if task.steps:
        reward_models.refuse_steps(folder, f"evaluate.tasks: the steps of {name}")
    by_steps = reward_models.judges_steps(folder)
    metric = f"{task.steps or 'min'} over steps by {name}" if by_steps else f"reward by {name}"
    asked = [(row[0], task.asked(evals.question(row, task.options))) for row in _read(inputs["rows"], task)]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    judges = reward_models.prepared(folder, tokenizer, task.steps)
    for place, turns in asked:
        with _named(place):
            # What it does not take is told before anything is answered.
            reward_models.text_of(tokenizer, turns, None if by_steps else "")
    answers, told = _answers(config, task, [turns for _, turns in asked], inputs, work)
    judge = judges(load(folder, config.precision, work.runtime.device).network)  # which lets the other model go
    samples = []
    for number, ((place, turns), answer) in enumerate(zip(asked, answers, strict=True)):
        with _named(place):
            worth = judge.worth(turns, answer)
        samples.append(Sample("", number, evals.shown(turns), "", answer, metric, worth))
        work.tell(number + 1, len(asked), "answers judged")
    return samples, told if by_steps else {"unbounded": True, **told}


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Name the row that a reward model cannot judge."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"evaluate.tasks: {place}: {error}. Leave such rows out, or lower `max_new_tokens`") from error


def _answers(
    config: Measure, task: Task, asked: Sequence[Sequence[Turn]], inputs: Mapping[str, Path], work: Work
) -> tuple[list[str], dict[str, Json]]:
    """The answers, and what is to be known of the questions."""
    model = _model(config, inputs, work)
    prompts = [model.ask(turns) for turns in asked]
    answers = generate(
        model,
        prompts,
        task.max_new_tokens,
        task.stop,
        work.runtime.eval_batch,
        lambda done: work.tell(done, len(prompts), "items"),
    )
    return answers, {"cut_questions": cut(model, prompts, task.max_new_tokens)}


def _ask_through_harness(
    config: Measure, task: Task, inputs: Mapping[str, Path], work: Work
) -> tuple[list[Sample], dict[str, Json]]:
    """The same rows through lm-eval; what it answered is scored a second time by our own exact match."""
    harness.require()
    own = evals.load(EXACT_MATCH)
    examples = own.examples(_read(inputs["rows"], task), task.options)
    model = _model(config, inputs, work)
    turns = [task.asked(example.turns) for example in examples]
    prompts = [model.ask(each) for each in turns]
    lost = cut(model, prompts, task.max_new_tokens)
    samples = harness.exact_match(
        model,
        prompts,
        [example.target for example in examples],
        task.options,
        task.max_new_tokens,
        task.stop,
        work.runtime.eval_batch,
        work.folder / "harness",
        _items(work),
    )
    agreeing = sum(
        own.score(example, sample.answer, task.options) == sample.score
        for example, sample in zip(examples, samples, strict=True)
    )
    shown = [
        Sample("", s.item, evals.shown(asked), e.target, s.answer, s.metric, s.score)
        for asked, e, s in zip(turns, examples, samples, strict=True)
    ]
    return shown, {"scored_twice": len(samples), "agreeing": agreeing, "cut_questions": lost}


def _items(work: Work) -> harness.Answered:
    return lambda done, total: work.tell(done, total, "requests")


def _read(folder: Path, task: Task) -> Iterable[evals.Row]:
    """The first `limit` rows of the source, shard by shard. Raises UserError when there are none, or at a bad one."""
    rows = list(islice(all_rows(folder), task.limit))
    if not rows:
        raise UserError(f"evaluate.tasks: the source {task.source!r} holds no rows, so there is nothing to ask")
    return rows


def _write(output: Path, samples: Sequence[Sample], more: Mapping[str, Json]) -> Facts:
    """`samples.jsonl` line by line, `scores.json` as the means of the (leaf) tasks, and `more`."""
    with (output / "samples.jsonl").open("w") as file:
        for sample in samples:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
    means: dict[str, Json] = {}
    for task in dict.fromkeys(sample.task for sample in samples):
        scores = [sample.score for sample in samples if sample.task == task]
        metric = next(sample.metric for sample in samples if sample.task == task)
        means[task] = {"metric": metric, "n": len(scores), "value": sum(scores) / len(scores)}
    (output / "scores.json").write_text(json.dumps({"tasks": means, **more}, indent=1))
    return {"items": len(samples), **more}
