"""Checkpoints of a training run: complete or invisible.

A checkpoint is written aside, with a record of every file's digest, synced, and renamed to `checkpoints/<step>`. What
is cut short by a kill is never seen under that name; what is damaged later does not match its record and is skipped.
Writing happens beside the training, from a copy in memory; a full disk costs that checkpoint, not the training.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.identity import tree_of

RECORD = "complete.json"
KEPT = 2
"""Newest checkpoints that stay: one more than needed, for when the newest is damaged."""


def publish(aside: Path, folder: Path, step: int) -> Path:
    """Make the files in `aside` visible as `folder/<step>`, then drop old checkpoints, and those of later steps, which
    are damaged, or the training would not be here. Returns where it stands."""
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
    upto = [path for path in _by_step(folder) if int(path.name) <= step]
    for other in _by_step(folder):
        if other not in upto[-KEPT:]:
            shutil.rmtree(other)
    return target


@dataclass(frozen=True)
class Saved:
    """How a save went."""

    step: int
    seconds: float
    path: Path | None
    """Where the checkpoint stands; None if it could not be written."""
    error: str = ""


class Saver:
    """Writes checkpoints into `folder`, one at a time, in a thread beside the training."""

    def __init__(self, folder: Path, aside: Path) -> None:
        self.folder, self.aside = folder, aside
        self.seconds = 0.0
        """How long the last save took."""
        self._thread: threading.Thread | None = None
        self._done: list[Saved] = []

    def save(self, step: int, write: Callable[[Path], None], beside: bool = True) -> None:
        """Have `write` fill a folder that becomes the checkpoint of `step`; waits for the save before. If not `beside`,
        it is written here and now."""
        self.wait()
        if not beside:
            self._save(step, write)
            return
        self._thread = threading.Thread(target=self._save, args=(step, write), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finished(self) -> list[Saved]:
        """The saves that ended since this was last asked."""
        done, self._done = self._done, []
        return done

    def _save(self, step: int, write: Callable[[Path], None]) -> None:
        started = time.monotonic()
        aside = self.aside / f"checkpoint-{step}"
        path, error = None, ""
        try:
            shutil.rmtree(aside, ignore_errors=True)
            write(aside)
            path = publish(aside, self.folder, step)
        except Exception as failure:  # a full disk: OSError, torch's RuntimeError or safetensors' own
            shutil.rmtree(aside, ignore_errors=True)
            free = shutil.disk_usage(self.folder.parent).free
            error = (
                f"the checkpoint of step {step} was not written to {self.folder} ({free / 1e9:.1f} GB free): {failure}"
            )
        self.seconds = time.monotonic() - started
        self._done.append(Saved(step, self.seconds, path, error))


def newest(folder: Path, below: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files match its record, and what was wrong with newer ones. Those of step `below`
    and later are removed first: the training goes back behind them."""
    skipped: list[str] = []
    for path in _by_step(folder):
        if below is not None and int(path.name) >= below:
            shutil.rmtree(path)
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
