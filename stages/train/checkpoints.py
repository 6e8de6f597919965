"""Checkpoints of a training run: complete or invisible.

A checkpoint is written aside, with a record of every file's digest, synced, and renamed to `checkpoints/<step>`. What
is cut short by a kill is never seen under that name; what is damaged later does not match its record and is skipped.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from stages.identity import tree_of

RECORD = "complete.json"
KEPT = 2
"""Newest checkpoints that stay: one more than needed, for when the newest is damaged."""


def publish(aside: Path, folder: Path, step: int) -> Path:
    """Make the files in `aside` visible as `folder/<step>`, then drop old checkpoints. Returns where it stands."""
    files = [asdict(file) for file in tree_of(aside).files]
    (aside / RECORD).write_text(json.dumps(files))
    for path in aside.rglob("*"):
        _sync(path)
    _sync(aside)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / str(step)
    if target.exists():  # a damaged one, or this could not have been reached again
        shutil.rmtree(target)
    aside.rename(target)
    _sync(folder)
    for old in _by_step(folder)[:-KEPT]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files match its record, and what was wrong with newer ones."""
    skipped: list[str] = []
    for path in reversed(_by_step(folder)):
        if not (wrong := _damage(path)):
            return path, skipped
        skipped.append(f"checkpoint {path.name}: {wrong}")
    return None, skipped


def _damage(checkpoint: Path) -> str:
    try:
        recorded = json.loads((checkpoint / RECORD).read_text())
    except (OSError, ValueError):
        return "its record is missing or unreadable"
    found = {file.path: asdict(file) for file in tree_of(checkpoint).files}
    wrong = [file["path"] for file in recorded if found.get(file["path"]) != file]
    return f"{', '.join(wrong)} missing or damaged" if wrong else ""


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
