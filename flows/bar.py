"""The live bar of a stage on the terminal: how far it is, how fast, and how long still.

Apart from `flows.screen`, so that `regrow plan` loads nothing that moves.
"""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from flows.screen import seconds


class _Rate(ProgressColumn):
    """Units per second, and the time that is left."""

    def render(self, task: Task) -> Text:
        if not task.total or not task.completed:
            return Text("")
        rate = task.completed / max(task.elapsed or 0.0, 1e-6)
        unit = task.fields["unit"]
        left = max(task.total - task.completed, 0) / rate
        shown = f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"
        return Text(f"{shown}  {seconds(left)} left", style="dim")


class Bar:
    """Stands at the bottom of the terminal until `stop`."""

    def __init__(self, console: Console, stage: str) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            _Rate(),
            TextColumn("[dim]{task.fields[extra]}"),
            console=console,
            transient=True,
        )
        self.progress.start()
        self.task = self.progress.add_task(stage, total=None, unit="", extra="")

    def show(self, done: float, total: float | None, unit: str, extra: str) -> None:
        """Move it; another unit is another kind of work, whose rate begins now."""
        if self.progress.tasks[0].fields["unit"] != unit:
            self.progress.reset(self.task, total=total)
        self.progress.update(self.task, completed=done, total=total, unit=unit, extra=extra)

    def stop(self) -> None:
        """Take it down."""
        self.progress.stop()
