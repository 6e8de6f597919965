"""Lays the scores of two models side by side: reads evaluate's artifact, gives `scores.json` and its report.

    {"tasks": {"spelling": {"metric": "exact_match", "n": 150,
                            "base": {"value", "low", "high"}, "tuned": {...},
                            "difference": {...}, "better": "tuned" | "base" | "unclear"}},
     "heldout_loss": {"base": {...}, "tuned": {...}, "difference": {...}, "better": ..., "tokens": n}}

Differences are tuned minus base, on the same items. "better" names a model only where the difference's 95 % interval
excludes 0. Loss is in nats a trained token, less is better, and its intervals resample packed sequences.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stages.identity import Json
from stages.intervals import Interval, bootstrap, paired_difference, share

BASE, TUNED = "base", "tuned"
"""The two models, as they are called in parts, scores and reports."""

HELDOUT_LOSS = "heldout_loss"
"""What is measured beside the tasks: the loss over the plan's held-out rows."""


class Item(NamedTuple):
    """One item that both models answered."""

    task: str
    item: int
    question: str
    target: str
    metric: str
    base: str
    tuned: str
    base_score: float
    tuned_score: float


def compare(scores: Path) -> dict[str, Json]:
    """The scores of both models, from the folder that evaluate made. Without held-out rows, `heldout_loss` is null."""
    tasks: dict[str, Json] = {}
    checks = {"scored_twice": 0, "agreeing": 0}
    for name in _tasks(scores):
        items = list(_items(scores, name))
        for leaf in dict.fromkeys(item.task for item in items):
            tasks[leaf] = _compared([item for item in items if item.task == leaf])
        for model in (BASE, TUNED):
            part = json.loads((scores / model / name / "scores.json").read_text())
            for check in checks:
                checks[check] += part.get(check, 0)
    return {"tasks": tasks, HELDOUT_LOSS: _loss(scores), **checks}


def samples(scores: Path) -> Iterator[dict[str, Json]]:
    """Every item with both models' answers, task by task."""
    for name in _tasks(scores):
        yield from (item._asdict() for item in _items(scores, name))


def _tasks(scores: Path) -> list[str]:
    return sorted(path.parent.name for path in (scores / BASE).glob("*/samples.jsonl"))


def _items(scores: Path, name: str) -> Iterator[Item]:
    both = [
        [json.loads(line) for line in (scores / model / name / "samples.jsonl").read_text().splitlines()]
        for model in (BASE, TUNED)
    ]
    for base, tuned in zip(*both, strict=True):
        assert (base["task"], base["item"]) == (tuned["task"], tuned["item"]), "two models, two lists of items"
        yield Item(
            task=f"{name}/{base['task']}" if base["task"] not in ("", name) else name,
            item=base["item"],
            question=base["question"],
            target=base["target"],
            metric=base["metric"],
            base=base["answer"],
            tuned=tuned["answer"],
            base_score=base["score"],
            tuned_score=tuned["score"],
        )


def _compared(items: list[Item]) -> dict[str, Json]:
    base, tuned = [item.base_score for item in items], [item.tuned_score for item in items]
    difference = paired_difference(base, tuned)
    return {
        "metric": items[0].metric,
        "n": len(items),
        BASE: share(base).document,
        TUNED: share(tuned).document,
        "difference": difference.document,
        "better": _better(difference, more_is_better=True),
    }


def _loss(scores: Path) -> Json:
    path = scores / BASE / HELDOUT_LOSS / "scores.json"
    if not path.exists():
        return None
    base = json.loads(path.read_text())
    tuned = json.loads((scores / TUNED / HELDOUT_LOSS / "scores.json").read_text())
    if not base["sums"]:
        return None
    tokens = base["tokens"]
    assert tokens == tuned["tokens"], "two models, two lists of sequences"
    difference = bootstrap([t - b for b, t in zip(base["sums"], tuned["sums"], strict=True)], tokens)
    return {
        BASE: bootstrap(base["sums"], tokens).document,
        TUNED: bootstrap(tuned["sums"], tokens).document,
        "difference": difference.document,
        "better": _better(difference, more_is_better=False),
        "tokens": sum(tokens),
    }


def _better(difference: Interval, *, more_is_better: bool) -> str:
    if difference.low > 0:
        return TUNED if more_is_better else BASE
    if difference.high < 0:
        return BASE if more_is_better else TUNED
    return "unclear"


def report(scores: Json) -> str:
    """The scores as Markdown: a table with intervals, and bars."""
    lines = [
        "| task | metric | items | base | tuned | difference | better |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, task in scores["tasks"].items():
        lines.append(
            f"| {name} | {task['metric']} | {task['n']} | {_percent(task[BASE])} | {_percent(task[TUNED])} "
            f"| {_percent(task['difference'], signed=True)} | {task['better']} |"
        )
    loss = scores[HELDOUT_LOSS]
    if loss:
        lines.append(
            f"| held-out rows | loss, nats a token | {loss['tokens']:,} tokens | {_nats(loss[BASE])} "
            f"| {_nats(loss[TUNED])} | {_nats(loss['difference'], signed=True)} | {loss['better']} |"
        )
    if len(lines) == 2:
        return "Nothing was measured: the recipe has no task, and pack held no rows out.\n"
    bars = [
        f"{name:<24.24} {model:<5} {_bar(task[model]['value'])} {task[model]['value']:6.1%}"
        for name, task in scores["tasks"].items()
        for model in (BASE, TUNED)
    ]
    text = "\n".join(lines) + "\n\nIn brackets: 95 % intervals; differences are paired, item by item.\n"
    return text + ("\n```text\n" + "\n".join(bars) + "\n```\n" if bars else "")


def _percent(interval: Json, *, signed: bool = False) -> str:
    value = f"{100 * interval['value']:+.1f}" if signed else f"{100 * interval['value']:.1f} %"
    return f"{value} ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"


def _nats(interval: Json, *, signed: bool = False) -> str:
    value = f"{interval['value']:+.3f}" if signed else f"{interval['value']:.3f}"
    return f"{value} ({interval['low']:.3f} to {interval['high']:.3f})"


def _bar(value: float, width: int = 30) -> str:
    full = round(max(0.0, min(1.0, value)) * width)
    return "█" * full + "░" * (width - full)
