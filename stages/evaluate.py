"""evaluate: what the base model, the model in production and the tuned model score on the same items, and their loss on
held-out rows.

Mapped: one part a model and task (`base/spelling`, `tuned/spelling`, `base/heldout_loss`, …), each an artifact of its
own that depends on that model, that task and the rows it reads. So another learning rate scores the tuned model
alone, another task only that task, and production's scores are those it got when it was the tuned model.
`stages.compare` lays the parts side by side.

A part writes `scores.json` and, for a task, `samples.jsonl`: one line an item with question, target, answer and score.
"""

import datetime
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from stages import evals, harness, reward_models
from stages.compare import BASE, HELDOUT_LOSS, PREFERENCES, PRODUCTION, TUNED
from stages.evals import Options
from stages.formats import BadRow
from stages.generation import Precision, Turn
from stages.identity import Tree
from stages.reward_models import Steps
from stages.rows import read_rows
from stages.stage import Facts, Part, Stage, StageConfig, UserError, Work

HELDOUT_FILES = ("plan.json", "heldout_*.arrow")

VOCABULARY = ("tokenizer.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
"""What of a model's files says which token an id is."""

TOKENIZER_FILES = (*VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "config.json")
"""What transformers reads a tokenizer from, without its chat template."""

EXACT_MATCH = "exact_match"


class Task(StageConfig):
    """One task: rows of ours (`source`), scored through lm-eval, by an eval of our own or by a reward model, or a task
    that lm-eval ships."""

    source: str = ""
    """A source of `fetch.data` whose rows are the items; best one with `split: heldout`."""
    lm_eval: str = ""
    """A task or group that lm-eval ships, by name, e.g. `gsm8k`."""
    eval: str = ""
    """An eval of stages/evals/ that asks and scores `source` without lm-eval."""
    reward_model: str = ""
    """A model of `fetch.reward_models` that says what answers to `source` are worth: any number, and more is better; of
    a process reward model, from 0 to 1."""
    steps: Steps | None = None
    """Only for a process reward model: how the probabilities that an answer's steps are right become one number. Its
    `min` when left out."""
    metric: str = ""
    """`exact_match` for a source; for an lm-eval task one of its metrics, empty for the first of which more is
    better."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many items, from the first. All when null."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens an answer may have. lm-eval's own tasks bring their own."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides the model's own end."""
    few_shot: int | None = Field(default=None, ge=0)
    """Worked examples before each item of an lm-eval task; null leaves it to the task."""
    question: str = "question"
    """Field of a row that is asked."""
    answer: str = "answer"
    """Field of a row that is the target."""
    system: str = ""
    """System prompt that stands before each question, unless its messages begin with one."""
    ignore_case: bool = False
    """Whether upper and lower case count as the same."""
    ignore_punctuation: bool = False
    """Whether ASCII punctuation is left out of the comparison."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.source) == bool(self.lm_eval):
            raise ValueError("a task names either `source` (rows of fetch.data) or `lm_eval` (a task it ships)")
        if self.lm_eval and self.eval:
            raise ValueError("`eval` scores rows of a `source`, not an lm-eval task")
        if self.source and self.metric not in ("", EXACT_MATCH):
            raise ValueError(f"rows of a source are scored by {EXACT_MATCH!r}, or by an `eval`; not by {self.metric!r}")
        if self.reward_model and (self.lm_eval or self.eval or self.metric):
            raise ValueError("`reward_model` scores rows of a `source`, without `lm_eval`, `eval` or `metric`")
        if self.steps and not self.reward_model:
            raise ValueError("`steps` says how a process reward model judges: it goes with `reward_model`")
        compared = ("answer", "ignore_case", "ignore_punctuation")
        unread = ("few_shot", *(compared if self.reward_model else ()))
        if self.lm_eval:
            unread = ("max_new_tokens", "stop", "question", *compared)
        for name in unread:
            if getattr(self, name) != type(self).model_fields[name].default:
                kind = "lm_eval" if self.lm_eval else "reward_model" if name in compared else "source"
                raise ValueError(f"`{name}` says nothing to a task with `{kind}`: take it out")
        if self.eval:
            evals.load(self.eval)
        return self

    @property
    def options(self) -> Options:
        """What an eval needs of it."""
        return Options(self.question, self.answer, self.ignore_case, self.ignore_punctuation)

    def asked(self, turns: list[Turn]) -> list[Turn]:
        """The turns that a model is asked, for those of an item."""
        if not self.system or turns[0]["role"] in ("system", "developer"):
            return turns
        return [{"role": "system", "content": self.system}, *turns]


class EvaluateConfig(StageConfig):
    """What is measured, on the base model, the one in production and the tuned one."""

    tasks: dict[str, Task] = Field(default_factory=dict)
    """Tasks by a name of your choice. A list will do too: names are then taken from the sources and lm-eval tasks."""
    heldout_loss: bool = True
    """Whether to measure the loss on held-out rows, where pack holds some out; and on held-out judged answers, whether
    the model tells the good from the bad."""
    precision: Precision = "bf16"
    """Of the weights while evaluating."""
    date: datetime.date | None = None
    """The date that a chat template gets when a task asks through it, as `convert.date` in training: that of the
    clock would make scores depend on the day."""

    @field_validator("tasks", mode="before", json_schema_input_type=dict[str, Task] | list[str | Task])
    @classmethod
    def _named(cls, tasks: Any) -> Any:
        if not isinstance(tasks, list):
            return tasks
        named: dict[str, Any] = {}
        for task in tasks:
            task = {"lm_eval": task} if isinstance(task, str) else task
            if not isinstance(task, Mapping):
                raise ValueError("a task is the name of an lm-eval task, or a mapping with `source` or `lm_eval`")
            name = str(task.get("source") or task.get("lm_eval") or "")
            if name in named:
                raise ValueError(f"two tasks would be called {name!r}: write `tasks` as a mapping, name: task")
            named[name] = task
        return named

    @field_validator("tasks")
    @classmethod
    def _names(cls, tasks: dict[str, Task]) -> dict[str, Task]:
        for name in tasks:
            if not name.replace("-", "_").isidentifier() or name in (HELDOUT_LOSS, PREFERENCES):
                raise ValueError(f"{name!r} cannot name a task: use letters, digits, '_' and '-'")
        return tasks

    @property
    def reward_models(self) -> dict[tuple[str, ...], str]:
        """The models of `fetch.reward_models` that its tasks ask, by the place in this section that names them."""
        asked = {name: task.reward_model for name, task in self.tasks.items() if task.reward_model}
        return {("tasks", name, "reward_model"): model for name, model in asked.items()}

    @property
    def steps(self) -> dict[tuple[str, ...], str]:
        """The same of those whose tasks say how steps combine, by the place that says it."""
        return {("tasks", name, "steps"): task.reward_model for name, task in self.tasks.items() if task.steps}


class Measure(StageConfig):
    """One part: a task, or the held-out loss when there is none."""

    task: Task | None = None
    precision: Precision = "bf16"
    date: datetime.date | None = None


def check(config: EvaluateConfig) -> None:
    """What can be told before anything is trained: UserError for a task that lm-eval does not ship, or without it.

    Takes some seconds where tasks of lm-eval are named, to read its index.
    """
    if any(not task.eval and not task.reward_model for task in config.tasks.values()):
        harness.require()
    harness.check_names([task.lm_eval for task in config.tasks.values() if task.lm_eval])


def check_rows(config: EvaluateConfig, rows: Tree, base: Tree, files: Callable[[Tree], Path]) -> None:
    """What the first row of each task's source tells before anything is trained: UserError for a task that cannot ask
    it, or not the model `base`. `files` gives the folder that some files of a tree stand in."""
    for name, task in config.tasks.items():
        if not task.source:
            continue
        shard, first = next(iter(_rows(name, task, rows)["rows"].folders().items()))
        for row in islice(all_rows(files(first.under(shard))), 1):
            try:
                if task.reward_model:
                    asked = [evals.question(row, task.options)]
                else:
                    chosen = evals.load(task.eval or EXACT_MATCH)
                    asked = [example.turns for example in chosen.examples([row], task.options)]
                for turns in map(task.asked, asked):
                    if len(turns) > 1:
                        folder = files(base.select(*TOKENIZER_FILES, "chat_template*"))
                        _try_asking(row[0], turns, folder, config.date)
            except UserError as error:
                raise UserError(f"evaluate.tasks.{name}: {error}") from error


def _try_asking(place: str, turns: list[Turn], folder: Path, today: datetime.date | None) -> None:
    """Raise UserError, naming the row, for a conversation that the model of a tokenizer's folder cannot be asked."""
    from transformers import AutoTokenizer

    from stages.generation import FROM_FOLDER, Model

    try:
        Model(None, AutoTokenizer.from_pretrained(folder, **FROM_FOLDER), today=today).ask(turns)
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: {error}") from error


def parts(config: EvaluateConfig, inputs: Mapping[str, Tree]) -> list[Part]:
    """A part for each model and task; `production` is among the inputs once a model stands there. Raises UserError when
    a task's source is not in `fetch.data`."""
    plan = inputs["plan"].select(*HELDOUT_FILES)
    measures: dict[str, tuple[Measure, dict[str, Tree]]] = {
        name: (Measure(task=task, precision=config.precision, date=config.date), _read_by(name, task, inputs))
        for name, task in config.tasks.items()
    }
    if config.heldout_loss:
        measures[HELDOUT_LOSS] = Measure(precision=config.precision), {"plan": plan}
    return [
        Part(
            f"{model}/{name}",
            measure.model_dump(mode="json"),
            {"weights": _weights(weights), **read, **(_tokenizer(weights, inputs) if measure.task is None else {})},
        )
        for model, weights in _models(inputs)
        for name, (measure, read) in measures.items()
    ]


def _models(inputs: Mapping[str, Tree]) -> Iterator[tuple[str, Tree]]:
    yield BASE, inputs["base"]
    if PRODUCTION in inputs:
        yield PRODUCTION, inputs[PRODUCTION]
    yield TUNED, inputs["weights"]


def _tokenizer(weights: Tree, inputs: Mapping[str, Tree]) -> dict[str, Tree]:
    """The tokenizer that the plan's rows went through, for a model whose own has other bytes: the one in production may
    come from another base model, to which the rows' ids are other tokens."""
    tuned = inputs["weights"]
    if weights.select(*VOCABULARY).digest == tuned.select(*VOCABULARY).digest:
        return {}
    return {"tokenizer": tuned.select(*TOKENIZER_FILES)}


def _read_by(name: str, task: Task, inputs: Mapping[str, Tree]) -> dict[str, Tree]:
    judge = {"reward_model": inputs["reward_models"].folder(task.reward_model)} if task.reward_model else {}
    return {**_rows(name, task, inputs["rows"]), **judge}


def _rows(name: str, task: Task, rows: Tree) -> dict[str, Tree]:
    if not task.source:
        return {}
    chosen = rows.folder(task.source)
    if not chosen.files:
        sources = sorted({file.path.split("/")[0] for file in rows.files})
        near = get_close_matches(task.source, sources, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"evaluate.tasks.{name}.source: no source is called {task.source!r} in fetch.data. "
            f"{hint}There are {', '.join(sources) or 'none'}"
        )
    return {"rows": chosen.under(task.source)}


def _weights(tree: Tree) -> Tree:
    """A model's own files: merge's report on how it went is none of them."""
    return Tree(tuple(file for file in tree.files if file.path != "merge.json"))


def run(config: Measure, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Score one model on one task, or measure its held-out loss."""
    from stages.evaluating import evaluate

    return evaluate(config, inputs, output, work)


def all_rows(folder: Path) -> Iterator[evals.Row]:
    """The rows of a source, shard by shard, each with its place. Raises UserError at a bad one."""
    for path in sorted(folder.rglob("rows.*")):
        name = path.relative_to(folder).as_posix()
        for place, row in read_rows(path, name):
            if isinstance(row, BadRow):
                raise UserError(f"{name} {place}: {row}")
            yield f"{name} {place}", row


def plugins(config: EvaluateConfig | Measure) -> dict[str, int]:
    """What scores, with the version that enters the key: the evals asked for, exact match where a source is scored
    twice, and reward models."""
    tasks = config.tasks.values() if isinstance(config, EvaluateConfig) else [config.task] if config.task else []
    judged = {"reward_models": reward_models.VERSION} if any(task.reward_model for task in tasks) else {}
    names = {task.eval or EXACT_MATCH for task in tasks if task.source and not task.reward_model}
    return {**{f"eval:{name}": evals.load(name).version for name in sorted(names)}, **judged}


STAGE = Stage(
    name="evaluate",
    artifact="scores",
    version=9,
    config=EvaluateConfig,
    run=run,
    parts=parts,
    part=Measure,
    plugins=plugins,
    exclusive=True,
    libraries=("lm_eval", "torch", "transformers"),
)
