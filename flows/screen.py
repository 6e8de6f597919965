"""What the terminal shows: the plan, a live bar for a stage, the summary. Fits 80 columns; only our own lines."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flows.execute import Follower
from flows.plan import Plan, Step
from flows.run import Run
from stages.build import Built
from stages.child import Event
from stages.stage import Facts

if TYPE_CHECKING:
    from flows.bar import Bar

STYLES = {"cached": "green", "runs": "yellow", "unknown": "yellow dim", "skipped": "dim"}
WARNINGS = 5
"""Warnings of the data report that are shown; `regrow inspect` has all."""
WORDS = {"cached": "cached", "runs": "runs", "unknown": "may run", "skipped": "skipped"}


def show_plan(console: Console, plan: Plan, why: bool = False) -> None:
    """The plan as a table: stage, state, key, reason."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    table.add_column("key", style="dim", no_wrap=True)
    table.add_column("why", overflow="fold")
    for step in plan.steps:
        state = Text(WORDS[step.state], style=STYLES[step.state])
        table.add_row(step.stage, state, (step.key or "")[:8], _reason(step, why))
    console.print(table)
    if plan.note:
        console.print(plan.note)


def _reason(step: Step, why: bool) -> str:
    told = [step.reason] if step.reason else []
    if step.drift and step.drift not in told:
        told.append(step.drift)
    if why and step.artifact and not step.reason:
        made = step.artifact.provenance
        told.append(f"made by run {made.get('run') or '?'} on {made.get('finished', '?')}")
    return escape("; ".join(told))


def plan_json(plan: Plan) -> str:
    """The plan for machines."""
    steps = [
        {"stage": s.stage, "state": s.state, "key": s.key, "reason": s.reason, "drift": s.drift}
        | ({"digest": s.artifact.digest} if s.artifact else {})
        for s in plan.steps
    ]
    noted = {"note": plan.note} if plan.note else {}
    return json.dumps({"recipe": plan.recipe, "steps": steps, "to_run": plan.to_run, **noted}, indent=2)


def seconds(value: float) -> str:
    """A duration for people: `4.2 s`, `1:05`, `2:03:07`."""
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass
class Screen:
    """Follows a run on the terminal: a live bar while a stage works, one line when it is done."""

    console: Console
    bar: "Bar | None" = None
    started: float = 0.0
    extra: str = ""
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def follower(self) -> Follower:
        """The callbacks to follow a run with."""
        return Follower(started=self._start, event=self._event, note=self._note, finished=self._finish)

    def _start(self, run: Run, stage: str) -> None:
        self.started, self.extra = time.monotonic(), ""
        if self.console.is_terminal:
            from flows.bar import Bar  # not in a plan's way

            self.bar = Bar(self.console, stage)

    def _event(self, run: Run, stage: str, event: Event) -> None:
        if event["event"] != "tell" or self.bar is None:
            return
        if isinstance(loss := event["metrics"].get("loss"), float):
            self.extra = f"loss {loss:.3f}"
        self.bar.show(event["done"], event["total"], event["unit"] or "items", self.extra)

    def _note(self, run: Run, stage: str, message: str) -> None:
        self.console.print(f"  [yellow]{stage}[/]: {escape(message)}")

    def stop(self) -> None:
        """Take the live bar down, also when a stage failed."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _finish(self, run: Run, stage: str, built: Built) -> None:
        self.stop()
        took = time.monotonic() - self.started
        mark, what = ("[green]●[/]", "cached") if built.hit else ("[green]✓[/]", seconds(took))
        facts = headline(stage, built.artifact.facts)
        self.rows.append((stage, what, built.artifact.key[:8], facts))
        self.console.print(
            f"{mark} {stage:<9} {what:>7}  [dim]{built.artifact.key[:8]}[/]  {escape(facts)}", soft_wrap=False
        )
        for warning in _warnings(stage, built.artifact.facts):
            self.console.print(f"  [yellow]⚠ {escape(warning)}[/]")


def headline(stage: str, facts: Facts) -> str:
    """The few facts of a stage that fit on its line."""
    return ", ".join(_HEADLINES[stage](facts)) if stage in _HEADLINES else ""


def _warnings(stage: str, facts: Facts) -> Iterator[str]:
    """What a stage found that a person should know before the next one; of many, the worst."""
    if stage == "pack":
        told = facts.get("warnings", [])  # which packing plans of older versions have not
        yield from told[:WARNINGS]
        if more := len(told[WARNINGS:]):
            yield f"and {more} more: see `regrow inspect`"
    elif "warning" in facts:
        yield facts["warning"]


def _fetched(facts: Facts) -> Iterator[str]:
    if "parameters" in facts:
        yield f"{facts['parameters'] / 1e6:,.0f} M parameters"
    if "rows" in facts:  # files are brought in unread: convert counts their rows
        yield f"{facts['rows']:,} rows"
    if "bytes" in facts:
        yield f"{facts['bytes'] / 1e6:,.1f} MB copied"


def _converted(facts: Facts) -> Iterator[str]:
    yield f"{facts['rows']:,} rows as {', '.join(sorted(facts['formats'])) or 'nothing'}"
    if dropped := sum(facts["dropped"].values()):
        yield f"{dropped:,} dropped"


def _tokenized(facts: Facts) -> Iterator[str]:
    yield f"{facts['tokens']:,} tokens"


def _packed(facts: Facts) -> Iterator[str]:
    yield f"{facts['bins']:,} sequences, {facts['fill']:.1%} full"
    yield f"{facts['trained_tokens'] / facts['tokens']:.1%} trained"
    if dropped := sum(facts["dropped"].values()):
        yield f"{dropped:,} dropped"


def _scored(facts: Facts) -> Iterator[str]:
    yield f"{facts['tokens']:,} tokens"


def _trained(facts: Facts) -> Iterator[str]:
    yield f"{facts['steps']:,} steps"
    if "first_reward" in facts:
        yield f"reward {facts['first_reward']:.3f} → {facts['last_reward']:.3f}"
    else:
        yield f"loss {facts['first_loss']:.3f} → {facts['last_loss']:.3f}"
    if "completions_per_second" in facts:
        yield f"{facts['completions_per_second']:,.1f} completions/s"
    else:
        yield f"{facts['tokens_per_second']:,.0f} tokens/s"
    if share := facts.get("model_flop_utilisation"):
        yield f"{share:.0%} of the device's FLOPs"
    if facts["resumed_at_step"]:
        yield f"resumed at {facts['resumed_at_step']:,}"


def _merged(facts: Facts) -> Iterator[str]:
    if likeness := facts.get("likeness"):
        yield f"top tokens as the adapter's: {likeness['top1_agreement']:.1%}"


def _evaluated(facts: Facts) -> Iterator[str]:
    if items := facts.get("items", 0):
        yield f"{items:,} answers scored"
    if held := facts.get("heldout_items", 0):
        yield f"{held:,} held-out judgements"


def _published(facts: Facts) -> Iterator[str]:
    yield "the gate passed" if facts["passed"] else "the gate did not pass"


_HEADLINES: dict[str, Callable[[Facts], Iterator[str]]] = {
    "fetch": _fetched,
    "convert": _converted,
    "tokenize": _tokenized,
    "pack": _packed,
    "score": _scored,
    "train": _trained,
    "merge": _merged,
    "evaluate": _evaluated,
    "publish": _published,
}
