"""Lays the scores of two or three models side by side: reads evaluate's artifact, gives `scores.json` and its report.

    {"tasks": {"spelling": {"metric": "exact_match", "n": 150,
                            "base": {"value", "low", "high"}, "tuned": {...},
                            "difference": {...}, "better": "tuned" | "base" | "unclear"}},
     "heldout_loss": {"base": {...}, "tuned": {...}, "difference": {...}, "better": ..., "tokens": n}}

A task whose scores are no shares of 1, as those of a reward model, has `"unbounded": true`: its values are means of
numbers of any size and sign.
Differences are tuned minus base, on the same items. "better" names a model only where the difference's 95 % interval
excludes 0. Loss is in nats a trained token, less is better, and its intervals resample packed sequences; those of
held-out judged answers resample what varies together (`stages.heldout.Heldout.groups`). What has
`"too_few": true` comes of too few items for an interval, and is unclear.
What is no number, of the base or the tuned model, has no entry (nor, of production, a comparison with it): it stands,
with the models whose figures are none, in `"not_numbers": {"spelling": ["tuned"], ...}`.
Held-out pairs of preferences are a task, `heldout_preferences`, whose entry also has "margin", with the models'
log-probabilities of the chosen answer over the rejected one, in nats a token.
Once a model stands in production, each entry also has its score and what the tuned model changes about it:

    "production": {"value", "low", "high"}, "over_production": {"difference": {...}, "better": "tuned" | "production" …}

Where that model has another tokenizer, to which the held-out rows' ids are other tokens, nothing of it is compared over
these rows, and `"other_tokenizer": true` says so.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from stages.errors import UserError
from stages.identity import Json
from stages.intervals import Interval, ahead, bootstrap, mean, paired_difference, share

BASE, PRODUCTION, TUNED = "base", "production", "tuned"
"""The models, as they are called in parts, scores and reports."""

OVER_PRODUCTION = "over_production"
"""The comparison with the model in production, where there is one."""

HELDOUT_LOSS = "heldout_loss"
"""What is measured beside the tasks: the loss over the plan's held-out rows."""

TOLD = {HELDOUT_LOSS: "held-out loss"}
"""What is not called as it is named."""

UNBOUNDED = "unbounded"
"""Set for a task whose scores are no shares of 1, but numbers of any size and sign: rewards, BLEU."""

NOT_NUMBERS = "not_numbers"
"""By task (or `heldout_loss`) the models whose figures are NaN or infinite, of which there is nothing to compare."""

TOO_FEW = "too_few"
"""Set for what comes of too few items for an interval (`stages.intervals.Interval`)."""

OTHER_TOKENIZER = "other_tokenizer"
"""Set where the held-out rows' ids are other tokens to the model in production."""

UNCOMPARED = "The model in production has another tokenizer, so it is not compared over the held-out rows"
"""The same in words."""

CUT = "cut_questions"
"""How many questions, over all models, lost their beginning because they are longer than the model's context."""

PREFERENCES = "heldout_preferences"
"""The task whose items are the plan's held-out judged answers, measured in the same pass."""


_SAME = ("task", "item", "target", "metric")
"""What an item has in common for all models."""


class Item(NamedTuple):
    """One item that all models answered."""

    task: str
    item: int
    question: str
    target: str
    metric: str
    base: str
    tuned: str
    base_score: float
    tuned_score: float
    production: str | None = None
    production_score: float | None = None


def compare(scores: Path) -> dict[str, Json]:
    """The scores of the models, from the folder that evaluate made. Without held-out rows, `heldout_loss` is null."""
    tasks: dict[str, Json] = {}
    broken: dict[str, list[str]] = {}
    checks = {"scored_twice": 0, "agreeing": 0, CUT: 0}
    for name in _tasks(scores):
        items = list(_items(scores, name))
        told = [json.loads((scores / model / name / "scores.json").read_text()) for model in _models(scores, name)]
        unbounded = any(part.get(UNBOUNDED, False) for part in told)
        fields = [_field(scores, field) if name == HELDOUT_LOSS else {} for field in ("margins", "groups", "behind")]
        margins, groups, behind = (found if all(found.values()) else {} for found in fields)
        for leaf in dict.fromkeys(item.task for item in items):
            answered = [item for item in items if item.task == leaf]
            figures = _figures(answered)
            # A margin that is no number still counts as a wrong choice, so the scores alone don't tell.
            broken[leaf] = [m for m in figures if not (_is_number(figures[m]) and _is_number(margins.get(m, [])))]
            if {BASE, TUNED}.isdisjoint(broken[leaf]):
                figures = {model: each for model, each in figures.items() if model not in broken[leaf]}
                # Some of lm-eval's metrics, such as BLEU from 0 to 100, are no shares of 1 either.
                shares = all(0 <= score <= 1 for scores in figures.values() for score in scores)
                together = groups.get(BASE, [])
                tasks[leaf] = _compared(answered[0].metric, figures, unbounded or not shares, together, behind)
                if margins:
                    tasks[leaf]["margin"] = _margin({model: margins[model] for model in figures}, together)
        for part in told:
            for check in checks:
                checks[check] += part.get(check, 0)
    sums = _field(scores, "sums")
    broken[HELDOUT_LOSS] = [model for model in sums if not _is_number(sums[model] or [])]
    loss = _loss(scores, broken[HELDOUT_LOSS])
    not_numbers = {name: models for name, models in broken.items() if models}
    found = {"tasks": tasks, HELDOUT_LOSS: loss, **checks, **({NOT_NUMBERS: not_numbers} if not_numbers else {})}
    apart = (loss or PREFERENCES in tasks) and _other_tokenizer(scores, PRODUCTION, HELDOUT_LOSS)
    return {**found, **({OTHER_TOKENIZER: True} if apart else {})}


def samples(scores: Path) -> Iterator[dict[str, Json]]:
    """Every item with the models' answers, task by task."""
    for name in _tasks(scores):
        for item in _items(scores, name):
            yield {field: value for field, value in item._asdict().items() if value is not None}


def _tasks(scores: Path) -> list[str]:
    return sorted(path.parent.name for path in (scores / BASE).glob("*/samples.jsonl"))


def _other_items(name: str) -> UserError:
    return UserError(
        f"evaluate.tasks.{name}: the models were not asked the same items: lm-eval or its data has changed since "
        "one of them was scored. Score all of them anew: `regrow run RECIPE evaluate+ --force evaluate`"
    )


def _models(scores: Path, name: str) -> list[str]:
    there = [model for model in (BASE, TUNED, PRODUCTION) if (scores / model / name).is_dir()]
    return [model for model in there if not _other_tokenizer(scores, model, name)]


def _other_tokenizer(scores: Path, model: str, name: str) -> bool:
    told = scores / model / name / "scores.json"
    return told.exists() and OTHER_TOKENIZER in json.loads(told.read_text())


def _items(scores: Path, name: str) -> Iterator[Item]:
    models = _models(scores, name)
    answers = [
        [json.loads(line) for line in (scores / model / name / "samples.jsonl").read_text().splitlines()]
        for model in models
    ]
    if len({len(each) for each in answers}) > 1:
        raise _other_items(name)
    for base, tuned, *production in zip(*answers, strict=True):
        for other in (tuned, *production):
            # Not the question: of lm-eval's tasks it is what went through each model's own chat template.
            if any(base[of] != other[of] for of in _SAME):
                raise _other_items(name)
        yield Item(
            task=base["task"] if name == HELDOUT_LOSS else _leaf(name, base["task"]),
            item=base["item"],
            question=base["question"],
            target=base["target"],
            metric=base["metric"],
            base=base["answer"],
            tuned=tuned["answer"],
            base_score=base["score"],
            tuned_score=tuned["score"],
            production=production[0]["answer"] if production else None,
            production_score=production[0]["score"] if production else None,
        )


def _leaf(name: str, task: str) -> str:
    return f"{name}/{task}" if task not in ("", name) else name


def _field(scores: Path, name: str) -> dict[str, Json]:
    """A field of every model's measured held-out rows; None where it is not there."""
    return {
        model: json.loads((scores / model / HELDOUT_LOSS / "scores.json").read_text()).get(name)
        for model in _models(scores, HELDOUT_LOSS)
    }


def _figures(items: list[Item]) -> dict[str, list[float]]:
    """The models' scores of the same items."""
    production = [item.production_score for item in items if item.production_score is not None]
    return {
        BASE: [item.base_score for item in items],
        TUNED: [item.tuned_score for item in items],
        **({PRODUCTION: production} if production else {}),
    }


def _is_number(figures: list[float]) -> bool:
    return math.isfinite(sum(figures))  # one that is not carries over


def _margin(found: dict[str, list[float]], groups: list[int]) -> Json:
    """Each model's mean margin over the held-out pairs, and what the tuned model changes about the base model's."""
    of_model = {model: mean(margins, groups).document for model, margins in found.items()}
    return {**of_model, **_difference(mean(_changes(found, BASE), groups), BASE, more_is_better=True)}


def _changes(found: dict[str, list[float]], model: str) -> list[float]:
    """The tuned model's figures minus another one's, item by item."""
    return [tuned - other for other, tuned in zip(found[model], found[TUNED], strict=True)]


def _compared(
    metric: str, figures: dict[str, list[float]], unbounded: bool, groups: list[int], behind: dict[str, list[float]]
) -> dict[str, Json]:
    """The models' scores of a task and how they differ, as `stages.intervals` has it; with `groups` of items that vary
    together, and, where the items are good answers, with the shares of the bad ones that they leave `behind`."""

    def value(model: str) -> Interval:
        if behind:
            return ahead(figures[model], behind[model])
        # No number is a share where they are unbounded, not even 0 or 1.
        return (mean if unbounded else share)(figures[model], groups)

    def against(model: str) -> dict[str, Json]:
        if behind:
            found = ahead(_changes(figures, model), _changes(behind, model))
        elif unbounded:
            found = mean(_changes(figures, model), groups)
        else:
            found = paired_difference(figures[model], figures[TUNED], groups)
        return _difference(found, model, more_is_better=True)

    compared: dict[str, Json] = {
        "metric": metric,
        **({UNBOUNDED: True} if unbounded else {}),
        "n": len(figures[BASE]),
        BASE: value(BASE).document,
        TUNED: value(TUNED).document,
        **against(BASE),
    }
    if PRODUCTION in figures:
        compared[PRODUCTION] = value(PRODUCTION).document
        compared[OVER_PRODUCTION] = against(PRODUCTION)
    return compared


def _loss(scores: Path, broken: list[str]) -> Json:
    """The comparison of the losses, without the models in `broken`, whose losses are no numbers."""
    sums, counts = _field(scores, "sums"), _field(scores, "tokens")
    if not sums or not all(sums.values()):  # a reward model has none
        return None
    tokens = counts[BASE]
    assert all(tokens == count for count in counts.values()), "two models, two lists of sequences"
    if not {BASE, TUNED}.isdisjoint(broken):
        return None
    found = {model: each for model, each in sums.items() if model not in broken}

    def against(model: str) -> dict[str, Json]:
        pairs = zip(found[model], found[TUNED], strict=True)
        return _difference(bootstrap([t - m for m, t in pairs], tokens), model, more_is_better=False)

    losses = {model: bootstrap(each, tokens).document for model, each in found.items()}
    over = {OVER_PRODUCTION: against(PRODUCTION)} if PRODUCTION in found else {}
    return {**losses, **against(BASE), **over, "tokens": sum(tokens)}


def _difference(difference: Interval, model: str, *, more_is_better: bool) -> dict[str, Json]:
    """The tuned model minus another one, and which of the two is clearly better."""
    winner, loser = (TUNED, model) if more_is_better else (model, TUNED)
    better = winner if difference.low > 0 else loser if difference.high < 0 else "unclear"
    better = "unclear" if difference.too_few else better
    return {"difference": difference.document, "better": better}


def report(scores: Json) -> str:
    """The scores as Markdown: a table with intervals, a second one against production, and bars."""
    measured = dict(scores["tasks"])
    if loss := scores[HELDOUT_LOSS]:
        measured["held-out rows"] = {"metric": "loss, nats a token", "n": f"{loss['tokens']:,} tokens", **loss}
    broken = [
        f"**{TOLD.get(name, name)}: a figure of the {model} model is not a number.**"
        for name, models in scores.get(NOT_NUMBERS, {}).items()
        for model in models
    ]
    if scores.get(OTHER_TOKENIZER):
        broken.append(f"**{UNCOMPARED}.**")
    if not measured:
        nothing = ["Nothing was measured: the recipe has no task, and pack held no rows out."]
        return "\n\n".join(broken or nothing) + "\n"
    lines = [
        "| task | metric | items | base | tuned | difference | better |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, task in measured.items():
        shown = _shown(name, task)
        lines.append(
            f"| {name} | {task['metric']} | {task['n']} | {shown(task[BASE])} | {shown(task[TUNED])} "
            f"| {shown(task['difference'], signed=True)} | {task['better']} |"
        )
    standing = {name: task for name, task in measured.items() if PRODUCTION in task}
    if standing:
        lines += [
            "",
            "Against the model that stood in production:",
            "",
            "| task | production | tuned | difference | better |",
            "| --- | ---: | ---: | ---: | --- |",
        ]
    for name, task in standing.items():
        shown, over = _shown(name, task), task[OVER_PRODUCTION]
        lines.append(
            f"| {name} | {shown(task[PRODUCTION])} | {shown(task[TUNED])} "
            f"| {shown(over['difference'], signed=True)} | {over['better']} |"
        )
    for name, task in scores["tasks"].items():
        if margin := task.get("margin"):
            told = ", ".join(f"{model} {_plain(margin[model], signed=True)}" for model in (BASE, TUNED))
            lines += ["", f"Margin in {name}, nats a token: {told}."]
    for line in broken:
        lines += ["", line]
    if lost := scores.get(CUT):
        lines += ["", f"**{lost} questions are longer than the model's context and lost their beginning.**"]
    bars = [
        f"{name:<24.24} {model:<10} {_bar(task[model]['value'])} {task[model]['value']:6.1%}"
        for name, task in scores["tasks"].items()
        for model in (BASE, PRODUCTION, TUNED)
        if model in task and UNBOUNDED not in task
    ]
    text = "\n".join(lines) + "\n\nIn brackets: 95 % intervals; differences are paired, item by item.\n"
    return text + ("\n```text\n" + "\n".join(bars) + "\n```\n" if bars else "")


def _shown(name: str, task: Json) -> Callable[..., str]:
    return _plain if name == "held-out rows" or UNBOUNDED in task else _percent


def _percent(interval: Json, *, signed: bool = False) -> str:
    value = f"{100 * interval['value']:+.1f}" if signed else f"{100 * interval['value']:.1f} %"
    return value + _ends(interval, 100, 1)


def _plain(interval: Json, *, signed: bool = False) -> str:
    value = f"{interval['value']:+.3f}" if signed else f"{interval['value']:.3f}"
    return value + _ends(interval, 1, 3)


def _ends(interval: Json, scale: float, digits: int) -> str:
    if TOO_FEW in interval:
        return " (too few items for an interval)"
    return f" ({scale * interval['low']:.{digits}f} to {scale * interval['high']:.{digits}f})"


def _bar(value: float, width: int = 30) -> str:
    full = round(max(0.0, min(1.0, value)) * width)
    return "█" * full + "░" * (width - full)
