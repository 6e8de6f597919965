"""Scoring completions with time limits, in processes of their own.

    with Judge(choices, seconds=10, workers=2) as judge:
        scores = judge.score([(completion, row), …])        # {name: [floats]}

A reward may be anybody's code and may never come back, so each item is scored in a worker process that is killed when
its time is up. What cannot be scored (an error, no number or one beyond `MOST`, no answer in time) is told with the
reward, the row and the completion, or counts as `otherwise`, and is counted.
"""

import json
import math
import os
import select
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from stages import own_code
from stages.errors import UserError
from stages.identity import Json
from stages.rewards import RewardChoice, load, model_of

Item = tuple[str, Mapping[str, Json]]
"""A completion and its prompt's row."""
MOST = 1e15
"""The largest reward there may be, by itself and times its weight. Trainers add rewards up and square them in float32,
which ends at 3.4e38: beyond it a group's standard deviation is no number any more."""
SHOWN = 200
"""Characters of a row or completion in a message."""


class _Job(NamedTuple):
    name: str
    place: int
    item: Item


class _Worker:
    """A process that scores one item at a time, in lines of JSON. It ends when its input does."""

    def __init__(self, choices: Mapping[str, RewardChoice], models: Mapping[str, Path]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stages.judge"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        chosen = {name: choice.model_dump(mode="json") for name, choice in choices.items()}
        self._send([chosen, {name: str(folder) for name, folder in models.items()}])
        self.choices = choices
        """The rewards that it scores."""
        self.job: _Job | None = None
        self.until = math.inf
        self.gone = False
        """Whether it answers no more."""

    def ready(self) -> None:
        """Wait until its rewards are loaded. Raises UserError when one of them does not load."""
        refused = self.answer()
        if refused:
            raise UserError(f"the rewards do not load: {refused}" if self.gone else str(refused))

    def give(self, job: _Job, seconds: float) -> None:
        self.job, self.until = job, time.monotonic() + seconds
        self._send([job.name, *job.item])

    def answer(self) -> float | str:
        """The score, or what went wrong."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.gone = not line
        found: float | str = json.loads(line) if line else "its process died"
        return found

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, which its answer will tell
            self.process.stdin.write(json.dumps(value, default=str).encode() + b"\n")
            self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Judge:
    """Rewards by name, ready to score. Use it as a context: its processes end with it.

    `seconds` is an item's time limit; `otherwise` what an item counts that cannot be scored, or None to raise UserError
    there. `unscored` counts those by the reward's name; `models` are the folders of the reward models they ask. Rewards
    that ask a model share a process beside the `workers`: as many copies of one would not fit into memory. Raises
    UserError when a reward does not load.
    """

    def __init__(
        self,
        choices: Mapping[str, RewardChoice],
        *,
        seconds: float,
        workers: int = 1,
        otherwise: float | None = None,
        models: Mapping[str, Path] | None = None,
    ) -> None:
        self.choices, self.seconds, self.otherwise, self.models = choices, seconds, otherwise, models or {}
        self.unscored: Counter[str] = Counter()
        asking = {name: choice for name, choice in choices.items() if model_of(choice)}
        others = {name: choice for name, choice in choices.items() if name not in asking}
        shares = [share for share in (asking, *[others] * max(1, workers)) if share]
        self._workers = [_Worker(share, self.models) for share in shares]
        try:
            for worker in self._workers:
                worker.ready()
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.end()

    def score(self, items: Sequence[Item]) -> dict[str, list[float]]:
        """Every reward's score of every item, in their order. Raises UserError as the policy says."""
        scores = {name: [math.nan] * len(items) for name in self.choices}
        jobs = {name: deque(_Job(name, place, item) for place, item in enumerate(items)) for name in self.choices}
        while True:
            for worker in self._workers:
                waiting = next((jobs[name] for name in worker.choices if jobs[name]), None)
                if worker.job is None and waiting:
                    worker.give(waiting.popleft(), self.seconds)
            busy = [worker for worker in self._workers if worker.job]
            if not busy:
                return scores
            left = min(worker.until for worker in busy) - time.monotonic()
            outputs = {worker.process.stdout.fileno(): worker for worker in busy if worker.process.stdout}
            ready = [outputs[number] for number in select.select(outputs, [], [], max(0.0, left))[0]]
            now = time.monotonic()  # replacing one worker takes long, and the others may answer meanwhile
            for worker in busy:
                if worker in ready:
                    answer = worker.answer()
                elif now >= worker.until:
                    answer, worker.gone = f"no score within {self.seconds:g} s", True
                else:
                    continue
                assert worker.job is not None
                job, worker.job = worker.job, None
                if worker.gone:
                    self._replace(worker)
                scores[job.name][job.place] = self._judged(job, answer, self.choices[job.name].weight)

    def hear(self, name: str, weight: float, ask: Callable[[], Any], item: Item) -> float:
        """A score that something else gives, held to the same rules. Raises UserError as the policy says."""
        try:
            answer: float | str = _number(ask())
        except Exception as error:  # whatever a user's code raises
            answer = f"{type(error).__name__}: {error}"
        return self._judged(_Job(name, 0, item), answer, weight)

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        fresh = _Worker(worker.choices, self.models)
        self._workers[self._workers.index(worker)] = fresh
        fresh.ready()

    def _judged(self, job: _Job, answer: float | str, weight: float) -> float:
        if isinstance(answer, float) and abs(answer) <= MOST and abs(answer * weight) <= MOST:  # which NaN is not
            return answer
        if self.otherwise is not None:
            self.unscored[job.name] += 1
            return self.otherwise
        completion, row = job.item
        if isinstance(answer, str):
            wrong = answer
        else:
            weighed = "" if weight == 1 else f" ({answer * weight:g} with its weight of {weight:g})"
            wrong = f"it gave {answer:g}{weighed}, expected a number up to {MOST:g}"
        raise UserError(
            f"the reward {job.name}: {wrong}, for the completion {completion[:SHOWN]!r} to the row "
            f"{json.dumps(dict(row), ensure_ascii=False, default=str)[:SHOWN]}. Mend the reward, or let such "
            "completions count nothing: train.objective_options.on_error: zero"
        )


def _number(given: Any) -> float:
    """What a reward gave. Raises TypeError for anything but one number, which a text never is."""
    with suppress(TypeError, ValueError):
        if not isinstance(given, str | bytes):
            return float(given)
    raise TypeError(f"it gave the {type(given).__name__} {repr(given)[:SHOWN]}, expected a number for each completion")


def _serve() -> None:
    """A worker's life: load the rewards, then answer one item after another. What they print goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: float | str) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        plain, folders = json.loads(sys.stdin.readline())
        models = {name: Path(folder) for name, folder in folders.items()}
        rewards = {name: load(RewardChoice.model_validate(choice)) for name, choice in plain.items()}
        for reward, options in rewards.values():
            reward.ready(options, models)
    except UserError as error:
        answer(str(error))
        return
    answer("")
    for line in sys.stdin:
        name, completion, row = json.loads(line)
        reward, options = rewards[name]
        try:
            answer(_number(reward.score(completion, row, options)))
        except Exception as error:  # whatever a reward's code raises
            answer(own_code.told(error, "reward"))


if __name__ == "__main__":
    _serve()
