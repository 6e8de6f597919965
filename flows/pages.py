"""The dashboard's pages as Markdown text: pure functions of a plan, or of an artifact's small files.

Nothing of Prefect in here. A page's key is fixed, so that the dashboard's page of that key shows its history over runs.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from flows import rollouts
from flows.charts import Bar, Box, chain, curve, image, interval_bars, number
from flows.facts import facts_rows
from flows.history import Event
from flows.plan import Plan, Step
from flows.screen import WORDS
from stages import data_charts, data_report
from stages.compare import (
    BASE,
    OTHER_TOKENIZER,
    OVER_PRODUCTION,
    PRODUCTION,
    TUNED,
    UNBOUNDED,
    UNCOMPARED,
    compare,
)
from stages.identity import Json
from stages.production import Move

MOST_BYTES = 90_000
"""A page's size at most: the dashboard's database keeps every version of every page."""

COLORS = {"cached": "#22c55e", "runs": "#f59e0b", "unknown": "#f59e0b", "skipped": "#94a3b8"}


@dataclass(frozen=True)
class Page:
    """One page about a stage's artifact: its key, the files it is made from, and how."""

    key: str
    title: str
    files: tuple[str, ...]
    markdown: Callable[[Path], str]
    most: float = math.inf
    """Bytes of those files from which on there is no page: they may have to come out of a bucket first."""


def plan_page(plan: Plan) -> str:
    """The plan: the stages as a graph, coloured by what will happen, and why; links to what it is looked at beside."""
    boxes = [Box(s.stage, WORDS[s.state], COLORS[s.state], s.state in ("unknown", "skipped")) for s in plan.steps]
    told = ", ".join(f"{s.stage} {WORDS[s.state]}" for s in plan.steps)
    return (
        f"{image(chain(boxes), told)}\n\n"
        f"{_table(('stage', 'plan', 'key', 'why'), [_step_row(s) for s in plan.steps])}\n"
        f"recipe `{plan.recipe}`, run `{plan.run}`"
        + (f"; {plan.note}\n\n" if plan.note else "\n\n")
        + f"{_beside(plan)}\n"
    )


def _beside(plan: Plan) -> str:
    before = plan.standing
    told = [f"[The history of {plan.recipe}](/v2/artifacts/key/{plan.recipe}-history)"]
    told += [f"in production before it: run {_run(before.run)}"] if before else []
    told += [f"delivers to {_place(plan.to)}"] if plan.to else []
    return " · ".join(told)


def _run(run: str) -> str:
    """A run's id as a link to where the dashboard shows it, whenever it was: its name there ends as its id does."""
    return f"[{run}](/v2/runs?tab=flow-runs&flow-run-search={run[-6:]}&{EVER})"


EVER = "start=2000-01-01T00:00:00Z&end=2100-01-01T00:00:00Z"
"""The dashboard's list of runs shows the last week only, unless it is told."""


def _place(to: str) -> str:
    """Where a model is delivered, as a link where a browser can follow it."""
    if to.startswith("hf://"):
        return f"[{to}](https://huggingface.co/{to.removeprefix('hf://')})"
    return f"<{to}>" if to.startswith(("https://", "http://")) else f"`{to}`"


def _step_row(step: Step) -> tuple[str, ...]:
    why = "; ".join(dict.fromkeys(told for told in (step.reason, step.drift) if told))
    return step.stage, WORDS[step.state].replace(" ", "\u00a0"), f"`{step.key[:8]}`" if step.key else "", why


def history_page(name: str, events: Sequence[Event], standing: Move | None) -> str:
    """A name's runs and moves, newest first, with the tuned model's scores over time as a chart; `standing` is the move
    that brought the model which production names."""
    runs = [event for event in reversed(events) if event.scores and event.what != "rolled back"]
    tasks = list(dict.fromkeys(task for event in runs for task in event.scores))
    bars = [
        _bar(event.at[5:16].replace("T", " "), event.scores[task], event.what == "promoted")
        for task in tasks[:1]
        for event in runs[-MOST_BARS:]
        if task in event.scores
    ]
    told = [_standing(name, standing)]
    told += [image(interval_bars(bars, f"{tasks[0]}, with its 95 % interval"), "scores over runs")] if bars else []
    rows = [
        (
            event.at[:16].replace("T", "\u00a0").replace("-", "\u2011"),  # so that no line ends within it
            event.what if event.by in ("", "gate") else f"{event.what} by {event.by}",
            f"`{event.model[:8]}`" if event.model else "",
            _run(event.run) if event.run else "",
            ", ".join(f"{task} {score['value']:.3f}" for task, score in list(event.scores.items())[:3]),
            event.why,
        )
        for event in events
    ]
    told.append(_table(("when (UTC)", "what", "weights", "run", "scores", "why"), rows))
    told.append(f"Blue bars: promoted. `regrow history {name}` shows the same in a terminal.")
    return "\n\n".join(told)


def _standing(name: str, move: Move | None) -> str:
    if move is None:
        return f"**{name}/production** names no model yet."
    by = "the gate" if move.by == "gate" else move.by
    return f"**{name}/production** names `{move.model['key'][:8]}` of run {_run(move.run)}, {move.what} by {by}."


MOST_BARS = 12
"""Runs in the history's chart, and tasks in the chart of scores: more make a picture that no page has room for."""


def loss_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The loss so far, the reward where there is one, and the last step, from training's metrics a step: `step`, `loss`
    and what else was measured."""
    told = []
    for name in ("loss", "reward"):
        points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
        told += [image(curve(points, name), f"{name} over steps")] if points else []
    last = {name.replace("_", " "): number(value) for name, value in rows[-1].items() if value is not None}
    return "\n\n".join([*told, _table(list(last), [list(last.values())])])


def _loss_of(folder: Path) -> str:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return loss_page([json.loads(line) for line in lines])


MOST_COMPLETIONS = 4
"""Of the first step and of the last one, on the page of completions."""
MOST_SHOWN = 2000
"""Characters of a prompt or a completion there."""


def _completions_of(folder: Path) -> str:
    return completions_page(list(rollouts.ends(folder / rollouts.FILE, MOST_COMPLETIONS)))


def completions_page(written: Sequence[rollouts.Rollout]) -> str:
    """Some completions of a training, under their steps and prompts."""
    told = []
    for (step, prompt), asked in groupby(written, key=lambda rollout: (rollout.step, rollout.prompt)):
        told += [f"### Step {step:,}", _fenced(_cut(prompt))]
        for each in asked:
            worth = ", ".join(f"{name} **{number(reward)}**" for name, reward in each.rewards.items())
            told += [worth or "It wrote:", _fenced(_cut(each.completion))]
    return "\n\n".join([*told, "`regrow rollouts RUN` shows all of them in a terminal."])


def _scores_of(folder: Path) -> str:
    return scores_page(compare(folder))


def scores_page(scores: Mapping[str, Any], brief: bool = False) -> str:
    """The models on every task, with 95 % intervals, as a chart and as a table; a second table against production.

    `brief` is for a form, which is narrow: it has no chart and names neither items nor metrics.
    """
    measured = dict(scores["tasks"])
    told = []
    if not brief:
        rewarded = {name: task for name, task in measured.items() if UNBOUNDED in task}
        told += _chart("score", {name: task for name, task in measured.items() if name not in rewarded})
        told += _chart("reward", rewarded)  # of another scale
    if loss := scores["heldout_loss"]:
        measured["held-out rows"] = {**loss, "metric": "loss, nats a token"}
    if not measured:
        return "Nothing was measured.\n"
    header = ("task", *(() if brief else ("items",)), BASE, TUNED, "difference", "better")
    told.append(_table(header, [_score_row(name, task, brief) for name, task in measured.items()]))
    if standing := {name: task for name, task in measured.items() if PRODUCTION in task}:
        told.append("Against the model in production when the run started:")
        columns = ("task", PRODUCTION, TUNED, "difference", "better")
        told.append(_table(columns, [_production_row(name, task) for name, task in standing.items()]))
    if scores.get(OTHER_TOKENIZER):
        told.append(f"**{UNCOMPARED}.**")
    return "\n\n".join(told)


def _chart(what: str, tasks: Mapping[str, Any]) -> list[str]:
    """The models' values in each task; nothing where there is no task."""
    bars = [
        _bar(f"{_short(name)} · {model}", task[model], model == TUNED)
        for name, task in list(tasks.items())[:MOST_BARS]
        for model in (BASE, PRODUCTION, TUNED)
        if model in task
    ]
    more = f"; the first {MOST_BARS} of {len(tasks):,} tasks" if len(tasks) > MOST_BARS else ""
    label = f"{what}, with its 95 % interval{more}"
    return [image(interval_bars(bars, label), f"{what}s of the models")] if bars else []


def _bar(label: str, value: Mapping[str, Any], tuned: bool) -> Bar:
    return Bar(label, value["value"], value["low"], value["high"], tuned)


def _production_row(name: str, task: Mapping[str, Any]) -> tuple[str, ...]:
    over = task[OVER_PRODUCTION]
    return name, _interval(task[PRODUCTION]), _interval(task[TUNED]), _interval(over["difference"], "+"), over["better"]


def _score_row(name: str, task: Mapping[str, Any], brief: bool) -> tuple[str, ...]:
    values = (_interval(task[BASE]), _interval(task[TUNED]), _interval(task["difference"], "+"))
    if brief:
        return name, *values, task["better"]
    items = f"{task['n']:,}" if "n" in task else f"{task['tokens']:,} tokens"
    return f"{name}, {task['metric']}", items, *values, task["better"]


def _interval(value: Mapping[str, float], sign: str = "") -> str:
    if value.get("too_few"):
        return f"{value['value']:{sign}.3f} (too few items for an interval)"
    return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f},\u00a0{value['high']:{sign}.3f}]"


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


PACKING = {
    "sequences": "bins",
    "tokens a sequence": "sequence_length",
    "sequences a step": "global_batch",
    "steps an epoch": "steps",
    "documents": "documents",
    "most documents a sequence": "max_documents",
    "cut to fit": "truncated",
    "tokens": "tokens",
    "of them trained": "trained_tokens",
}


def _packing_of(folder: Path) -> str:
    return packing_page(json.loads((folder / "plan.json").read_text()))


def packing_page(plan: Mapping[str, Json]) -> str:
    """How full the packed sequences are, and what training will make of them."""
    rows = [("filled", f"**{plan['fill']:.1%}**"), ("padding", f"{1 - plan['fill']:.1%}")]
    rows += [(told, f"{plan[name]:,}") for told, name in PACKING.items()]
    return _table(("", "packed"), rows)


MOST_SOURCES = 40
"""Sources in the report's chart; its tables have all of them."""


def _report_of(folder: Path) -> str:
    return report_page(json.loads((folder / "report.json").read_text("utf-8")))


def report_page(report: Mapping[str, Any]) -> str:
    """What became of the data: tables, warnings, charts, and rows with what trains in them."""
    largest = sorted(report["sources"], key=lambda source: -source["tokens"])[:MOST_SOURCES]
    drawn = [source for source in report["sources"] if source in largest]
    which = "each source" if len(drawn) == len(report["sources"]) else f"the {len(drawn)} largest sources"
    charts = [(f"Tokens of {which}; green ones train", data_charts.tokens({"sources": drawn}))]
    if len(report["lengths"]["counts"]) > 1:  # one bar is no picture
        charts.append(("Rows by their tokens", data_charts.lengths(report)))
    told = [data_report.markdown(report)]
    told += [f"### {title}\n\n{image(_standing_alone(svg), title)}\n" for title, svg in charts]
    told.append(f"{_lengths(report['lengths'])}\n")
    if report["samples"]:
        told.append("### Rows as they train\n\nWhat stands between ⟦ and ⟧ trains.\n")
    for sample in report["samples"]:
        for pieces in sample["sequences"]:
            text = "".join(f"⟦{text}⟧" if trains else text for text, trains in pieces)
            told.append(f"{sample['place']}\n\n{_fenced(text.rstrip())}\n")
    return "\n".join(told)


def _lengths(lengths: Mapping[str, Any]) -> str:
    """What the chart of rows by their tokens shows, for whom its axis is not enough."""
    marks = {"shortest": "min", "median": "median", "95th percentile": "p95", "longest": "max"}
    told = ", ".join(f"{mark} {lengths[name]:,}" for mark, name in marks.items())
    return f"Tokens in a row, before any cut: {told}."


def _standing_alone(svg: str) -> str:
    """A chart of a page as a file of its own, which needs to say what it is and how large."""
    return svg.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{data_charts.WIDTH}" ', 1)


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


def _card_of(folder: Path) -> str:
    """The card without the YAML before it, which is for the Hub."""
    return re.sub(r"\A---\n.*?\n---\n", "", (folder / "README.md").read_text(), flags=re.DOTALL)


PAGES: Mapping[str, Sequence[Page]] = {
    "pack": (
        Page("data-report", "What became of the data", ("report.json",), _report_of),
        Page("packing", "How full the packed sequences are", ("plan.json",), _packing_of),
    ),
    "train": (
        Page("loss-curve", "Loss over steps", ("metrics.jsonl",), _loss_of),
        Page("completions", "What the model wrote while it trained", (rollouts.FILE,), _completions_of, 64 * 2**20),
    ),
    "evaluate": (
        Page(
            "scores",
            "The tuned model against the others",
            ("*scores.json", "*samples.jsonl"),
            _scores_of,
        ),
    ),
    "publish": (Page("model-card", "The published model's card", ("README.md",), _card_of),),
}


def facts_page(facts: Mapping[str, Any]) -> str:
    """What came out of a stage that has no page of another kind."""
    return _table(("", "what came out"), facts_rows(facts))


def trimmed(markdown: str, most: int = MOST_BYTES) -> str:
    """The text, cut at a line's end when it is too long for a page, saying so."""
    data = markdown.encode()
    if len(data) <= most:
        return markdown
    kept = data[:most].decode(errors="ignore").rpartition("\n")[0]
    return f"{kept}\n\n… cut here: {len(data):,} bytes are too many for this page; the artifact has all of it.\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
