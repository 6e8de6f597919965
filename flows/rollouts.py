"""`regrow rollouts`: what a model wrote while it trained, with what each completion was worth."""

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from flows.show import artifact_named, run_named
from stages.errors import UserError
from stages.store import Artifact, Store

FILE = "rollouts.arrow"
SHOWN = 160
"""Characters of a prompt: its beginning and its end."""


class Rollout(NamedTuple):
    """One completion."""

    step: int
    prompt: str
    completion: str
    rewards: dict[str, float]


def show_rollouts(
    store: Store, what: str, step: int | None, worst: bool, console: Console, as_json: bool = False
) -> None:
    """Show the completions of a training, by its run or its key: those of one `step`, or of all; as they came, or the
    `worst` first. Raises UserError where there are none."""
    artifact = _training(store, what)
    tree = artifact.tree.select(FILE)
    if not tree.files:
        raise UserError(f"{what}: this training wrote no completions; {_objective(artifact)} learns from given ones")
    weights = _weights(artifact)
    found = read(store.view(tree) / FILE, step)
    if worst:
        found = iter(sorted(found, key=lambda rollout: total(rollout, weights)))
    first = next(found, None)
    if first is None:
        raise UserError(f"{what}: nothing was written in step {step}; the training has {artifact.facts['steps']:,}")
    with console.pager() if console.is_terminal and not as_json else nullcontext():
        for rollout in chain([first], found):
            if as_json:
                console.out(json.dumps({**rollout._asdict(), "total": total(rollout, weights)}), highlight=False)
            else:
                _show(rollout, weights, console)


def read(path: Path, step: int | None = None) -> Iterator[Rollout]:
    """The completions in a training's file, in their order."""
    from stages.tables import read_batches

    for batch in read_batches(path):
        for row in batch.to_pylist():
            if step is None or row["step"] == step:
                yield _rollout(row)


def _rollout(row: Mapping[str, Any]) -> Rollout:
    return Rollout(row["step"], row["prompt"], row["completion"], dict(row["rewards"]))


def ends(path: Path, most: int) -> Iterator[Rollout]:
    """The first completions of the first step, and of the last one; at most so many of each."""
    import pyarrow.compute as pc

    from stages.tables import read_table

    table = read_table(path)
    steps = table["step"]
    for step in dict.fromkeys((steps[0].as_py(), steps[-1].as_py())):
        for row in table.filter(pc.equal(steps, step)).slice(0, most).to_pylist():
            yield _rollout(row)


def total(rollout: Rollout, weights: Mapping[str, float]) -> float:
    """What the training made of a completion's rewards: their weighted sum."""
    return sum(weights.get(name, 1.0) * reward for name, reward in rollout.rewards.items())


def shortened(text: str, most: int = SHOWN) -> str:
    """A text on one line, without its middle where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2]} … {line[-most // 2 :]}"


def _training(store: Store, what: str) -> Artifact:
    """The training of a run, or the one whose key starts so."""
    if record := run_named(store, what):
        made: Any = record["stages"]
        if "train" not in made:
            raise UserError(f"{what}: this run has trained nothing (yet)")
        found = store.recall("train", made["train"]["key"], made["train"]["digest"])
        if found is None:
            raise UserError(f"{what}: its training is no longer in the store")
        return found
    artifact = artifact_named(store, what)
    if artifact.stage != "train":
        raise UserError(f"{what} is an artifact of {artifact.stage}: name a run, or the key of its training")
    return artifact


def _objective(artifact: Artifact) -> str:
    config: Any = artifact.action["config"]
    return str(config["objective"])


def _weights(artifact: Artifact) -> dict[str, float]:
    config: Any = artifact.action["config"]
    options = config["objective_options"]
    acted = options.get("environment")
    weights = {name: choice["weight"] for name, choice in options.get("rewards", {}).items()}
    return weights | ({"environment": acted["weight"]} if acted else {})


def _show(rollout: Rollout, weights: Mapping[str, float], console: Console) -> None:
    worth = [f"{name} {reward:.3g}" for name, reward in rollout.rewards.items()]
    if len(worth) > 1 or any(weights.get(name, 1.0) != 1.0 for name in rollout.rewards):
        worth.append(f"total {total(rollout, weights):.3g}")
    console.print(Text("── " + " · ".join([f"step {rollout.step}", *worth]), style="bold"))
    console.print(Text(shortened(rollout.prompt), style="dim"))
    console.print(Text(rollout.completion))
    console.print()
