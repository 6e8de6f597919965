"""What a model wrote while it trained, and what that was worth: judged once, kept a file a batch, joined at the end."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.identity import Json
from stages.judge import Judge
from stages.objectives.grpo import ENVIRONMENT
from stages.rewards import ANSWER
from stages.tables import read_table
from stages.train.episodes import Episodes

ROLLOUTS = pa.schema(
    [
        pa.field("step", pa.uint32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("rewards", pa.map_(pa.string(), pa.float64()), nullable=False),
    ]
)
"""`rollouts.arrow`."""

NAME, UNSCORED = "rollouts.arrow", "unscored.json"
"""What a checkpoint holds: the completions before it, and how many of them each reward could not judge."""


class Recorder:
    """Judges completions once for all rewards, if there are any, and keeps what was written: a file a batch, in
    `folder`."""

    def __init__(self, judge: Judge | None, folder: Path) -> None:
        self.judge, self.folder = judge, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._scores: dict[str, list[float]] = {}

    def functions(
        self, step: Callable[[], int], said: Callable[[Sequence[int]], str], episodes: Episodes | None = None
    ) -> list[Callable[..., list[float]]]:
        """One reward function a reward, as TRL calls them one after another on the same batch; the last one is that of
        the environment, where `episodes` have one. `said` is the text of a completion's tokens without the model's own
        reasoning, of which what it says last in an episode has none."""
        judge = self.judge
        assert judge is not None
        names = [*judge.choices, *([ENVIRONMENT] if episodes and episodes.weights else [])]

        def function(name: str) -> Callable[..., list[float]]:
            def score(prompts: list[Any], completions: list[Any], columns: list[str], **given: Any) -> list[float]:
                if name == names[0]:
                    rows: list[dict[str, Json]] = [json.loads(text) for text in columns]
                    if episodes:
                        prompts, shown, completions = episodes.texts(prompts, completions, given["completion_ids"])
                    else:
                        shown = completions
                    answers = completions if episodes else [said(ids) for ids in given["completion_ids"]]
                    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
                        row |= {"rendered_prompt": prompt, ANSWER: answer}
                    self._scores = judge.score(list(zip(completions, rows, strict=True)))
                    if episodes and episodes.weights:
                        (weight,) = episodes.weights
                        self._scores[ENVIRONMENT] = [
                            judge.hear(ENVIRONMENT, weight, partial(episodes.reward, place), (completion, row))
                            for place, completion, row in zip(given["environments"], completions, rows, strict=True)
                        ]
                    self.keep(step(), prompts, shown)
                return self._scores[name]

            score.__name__ = name
            return score

        return [function(name) for name in names]

    def save(self, checkpoint: Path) -> None:
        """Put into a checkpoint what was written before it, and how much of that could not be judged: a training that
        goes on may do so on another machine."""
        self.write(checkpoint / NAME)
        if self.judge:
            (checkpoint / UNSCORED).write_text(json.dumps(self.judge.unscored, sort_keys=True))

    def go_on(self, checkpoint: Path | None) -> int:
        """Keep what was written before a checkpoint, and nothing of what came after it: that will be written again.
        Returns how many completions those are."""
        for path in self._files():
            path.unlink()
        if checkpoint is None:
            return 0
        first = shutil.copyfile(checkpoint / NAME, self.folder / _part(0))
        if self.judge:
            self.judge.unscored.update(json.loads((checkpoint / UNSCORED).read_text()))
        return len(read_table(first))

    def write(self, path: Path) -> int:
        """All batches as one file; returns how many completions."""
        count = 0
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, ROLLOUTS) as writer:
            for part in self._files():
                table = read_table(part)
                writer.write_table(table)
                count += len(table)
        return count

    def keep_with(
        self,
        name: str,
        step: Callable[[], int],
        prompts: Sequence[str],
        completions: Sequence[str],
        scores: list[float],
    ) -> None:
        """Write down a batch of the step after `step` ones, with one reward that was found elsewhere."""
        self._scores = {name: scores}
        self.keep(step(), prompts, completions)

    def keep(self, step: int, prompts: Sequence[str], completions: Sequence[str]) -> None:
        """Write down a batch of the step after `step` ones, with the rewards that were found last."""
        rewards = [{name: scores[i] for name, scores in self._scores.items()} for i in range(len(prompts))]
        rows = [
            {"step": step + 1, "prompt": prompt, "completion": completion, "rewards": list(reward.items())}
            for prompt, completion, reward in zip(prompts, completions, rewards, strict=True)
        ]
        path = self.folder / _part(step)
        earlier = read_table(path).to_pylist() if path.exists() else []
        with pa.OSFile(str(path) + ".new", "wb") as sink, pa.ipc.new_file(sink, ROLLOUTS) as writer:
            writer.write_table(pa.Table.from_pylist([*earlier, *rows], schema=ROLLOUTS))
        Path(str(path) + ".new").rename(path)

    def _files(self) -> Iterable[Path]:
        return sorted(self.folder.glob("*.arrow"))


def _part(step: int) -> str:
    return f"{step:08d}.arrow"
