"""The summary of a run on the terminal: every figure whole, also beside a long name."""

from rich.console import Console

from flows.local import _scores
from stages.identity import Json


def told(value: float, reach: float, **more: bool) -> Json:
    return {"value": value, "low": value - reach, "high": value + reach, **more}


def test_a_long_name_is_cut_and_no_figure_and_too_few_items_are_said() -> None:
    models = {"base": told(0.5, 0.405), "tuned": told(0.5, 0.405), "difference": told(0, 0.573)}
    few = {name: told(5.65, 0, too_few=True) for name in models}
    scores = {"tasks": {"heldout_preferences": {"n": 2, **models}}, "heldout_loss": few}
    console = Console(width=80)
    with console.capture() as shown:
        console.print(_scores(scores))
    task, loss = shown.get().splitlines()[1:]
    assert task.split("  ") == [
        "heldout_preferences % of…",
        "50.0 [9.5, 90.5]",
        "50.0 [9.5, 90.5]",
        "0.0 [-57.3, 57.3]",
    ]
    assert loss.count("5.65 [too few]") == 3 and len(loss) <= 80


def test_without_figures_there_are_no_lines() -> None:
    assert _scores({"tasks": {}, "heldout_loss": None}).row_count == 0
