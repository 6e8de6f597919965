"""reasoning-gym's generated tasks: endless questions with checkable answers, made on the spot, no download.

The library draws item `i` of seed `s` from `Random(s + i)`: items of seeds 1 and 2 are nearly all the same. So the
recipe's seed is hashed into the library's, and different seeds give different items.

A few of its tasks go through sets, so their items depend on PYTHONHASHSEED too: a stage's child process fixes it.
"""

import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path

from stages.errors import UserError
from stages.identity import Json
from stages.sources import Found
from stages.sources.pieces import Pieces
from stages.stage import Facts, Work

TRIES = 10
"""Items drawn at most for each row asked for, where a task repeats its questions."""


def resolve(task: str, options: Mapping[str, Json], size: int, seed: int, place: str) -> Found:
    """What will be generated. Raises UserError when the library or the task is not there."""
    try:
        version = importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{place}: the library is missing: pip install reasoning-gym") from error
    if task not in _tasks(f"{task}.py") and task not in (known := _tasks()):  # most are in a file of their name
        near = difflib.get_close_matches(task, known, 3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(sorted(known))}."
        raise UserError(f"{place}: there is no task {task!r}. {hint}")
    return Found({"task": task, "options": dict(options), "size": size, "seed": seed, "version": version})


def _tasks(file: str = "*.py") -> set[str]:
    """Task names, read from the library's files of that name: importing it would take seconds."""
    spec = importlib.util.find_spec("reasoning_gym")
    assert spec is not None and spec.origin is not None
    texts = [path.read_text("utf-8") for path in Path(spec.origin).parent.rglob(file)]
    return {name for text in texts for name in re.findall(r'^DATASET_NAME = "(\w+)"', text, re.M)}


def bring(found: Mapping[str, Json], where: Mapping[str, Json], pieces: Pieces, work: Work) -> Facts:
    """Write JSON Lines: each row as messages, and with the question, answer and metadata that scoring needs.

    No question comes twice. Raises UserError when the task does not take the options, or has too few questions.
    """
    import reasoning_gym

    task, size = found["task"], found["size"]
    _, options = reasoning_gym.factory.DATASETS[task]
    known = {field.name for field in dataclasses.fields(options)} - {"seed", "size"}
    for name in found["options"]:
        if name not in known:
            raise UserError(f"reasoning_gym's {task} has no option {name!r}: expected {', '.join(sorted(known))}")
    start = int.from_bytes(hashlib.sha256(str(found["seed"]).encode()).digest()[:4], "big") >> 1
    try:
        items = reasoning_gym.create_dataset(task, **found["options"], size=TRIES * size, seed=start)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"reasoning_gym's {task} refuses its options: {error}") from error
    seen: set[str] = set()
    with pieces.new(".jsonl").open("w", encoding="utf-8") as file:
        for index in range(TRIES * size):
            item = items[index]
            if item["question"] in seen:
                continue
            seen.add(item["question"])
            file.write(json.dumps(_row(item, task, index), ensure_ascii=False, default=_plain) + "\n")
            if len(seen) % 100 == 0:
                work.tell(len(seen), size, "rows")
            if len(seen) == size:
                return {"rows": size, "repeated": index + 1 - size}
    raise UserError(
        f"reasoning_gym's {task} gave only {len(seen)} different questions in {TRIES * size} tries: ask for a smaller "
        "size, or for options that make more of them"
    )


def _row(item: Mapping[str, Json], task: str, index: int) -> dict[str, Json]:
    question, answer = item["question"], item["answer"]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {
        "messages": messages,
        "question": question,
        "answer": answer,
        "task": task,
        "index": index,  # the library's own number of the item
        "metadata": item["metadata"],
    }


def _plain(value: object) -> Json:
    """What JSON cannot say, always in the same way: sets sorted, fractions, dates and the like as text."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
