"""`regrow inspect`: what became of the data, and some rows with what trains in them in colour."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flows.plan import make_plan
from flows.run import Run
from stages.data_report import UNREAD, by_reason, by_source, headline, places, unread
from stages.errors import UserError

TRAINED, GIVEN = "bold green", "dim"
OPENING, CLOSING = "⟦", "⟧"
"""What stands around trained text where there is no colour."""


def inspect(run: Run, recipe: Path, console: Console, as_json: bool, flags: Sequence[str] = ()) -> None:
    """Show the data report of a recipe's plan. Raises UserError, with the command and its `flags`, when it was never
    packed."""
    step = make_plan(run, ("+pack",)).step("pack")
    if step.state != "cached" or step.artifact is None:
        raise UserError(
            f"the data of this recipe is not packed yet: regrow run {shlex.join([str(recipe), '+pack', *flags])}"
        )
    folder = run.store.view(step.artifact.tree.select("report.json", "report.html"))
    text = (folder / "report.json").read_text("utf-8")
    if as_json:
        console.print_json(text)
        return
    report = json.loads(text)
    console.print(" · ".join(f"[bold]{value}[/] {escape(what)}" for what, value in headline(report)))
    for warning in report["warnings"]:
        console.print(f"[yellow]⚠ {escape(warning)}[/]")
    for header, rows in (by_source(report), by_reason(report)):
        if rows:
            console.print()
            console.print(_table(header, rows))
    unused = unread(report)
    if report["dropped"] or unused:
        console.print()
    for reason, where in places(report).items():
        console.print(f"[dim]{escape(reason)}:[/] {escape(where[0])}{', …' * (len(where) > 1)}")
    for source, columns in unused.items():
        console.print(f"[dim]{UNREAD} {escape(source)}:[/] {escape(columns)}")
    show_samples(report["samples"], console)
    console.print(f"\n[dim]the whole report:[/] {escape(str(folder / 'report.html'))}", soft_wrap=True)


def show_samples(samples: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Rows as they train: in colour, or between brackets where the terminal has none."""
    coloured = console.color_system is not None and not console.no_color
    if samples:
        how = f"[{TRAINED}]This[/] trains" if coloured else f"What stands between {OPENING} and {CLOSING} trains"
        console.print(f"\n{how}, the rest is only read.")
    for sample in samples:
        console.print()
        console.rule(Text(sample["place"], style="dim"), align="left", style="dim")
        for pieces in sample["sequences"]:
            told = Text()
            for text, trains in pieces:
                marked = f"{OPENING}{text}{CLOSING}" if trains and not coloured else text
                told.append(marked, style=TRAINED if trains else GIVEN)
            console.print(told)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(header[0], overflow="fold")
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
