"""Checkpoints of a stage under way: complete or invisible, kept until its artifact is committed.

`checkpoints/<key>/<attempt>/<step>/files/…` and, written last and only once, `…/<step>/complete.json` listing the files
with their sha256. Attempts never write into one another's folders, so a holder that lost its lease harms nobody.
"""

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from stages.cache import if_free
from stages.errors import UserError
from stages.identity import File, Tree, tree_of
from stages.manifest import check_paths
from stages.objects import Entry, MayNotDelete, clear_errors
from stages.store import BadBlob, Store
from stages.views import fetched, spread

FETCHING = ".fetching-"
"""Begins the name of a folder into which a checkpoint comes."""
KEPT = 2
"""Complete checkpoints that a save leaves: the newest, and one more in case it turns out bad."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint in the store."""

    key: str
    attempt: str
    step: int
    files: Tree

    @property
    def path(self) -> str:
        """Its folder in the store."""
        return _folder(self.key, self.attempt, self.step)


def save_checkpoint(store: Store, key: str, attempt: str, step: int, folder: Path) -> Checkpoint:
    """Copy a local folder into the store as the checkpoint of `step`; `attempt` names one process's try.

    Returns when it is complete, and drops all but the newest `KEPT` checkpoints of the key. The files may become the
    store's own (hard links) and turn read-only. Raises UserError where they cannot be written.
    """
    assert attempt and "/" not in attempt, attempt
    files = tree_of(folder)
    check_paths(files)
    made = Checkpoint(key, attempt, step, files)
    if store.objects.stat(f"{made.path}/complete.json") is not None:
        raise UserError(f"{made.path}: this attempt already saved this step; an attempt's name must be new")

    def upload(file: File) -> None:
        store.objects.upload(folder / file.path, f"{made.path}/files/{file.path}", file.sha256)

    list(spread(upload, files.files, 4))
    record = {"step": step, "files": [[f.path, f.size, f.sha256] for f in files.files]}
    store.objects.create(f"{made.path}/complete.json", json.dumps(record).encode())
    _prune(store, made)
    return made


def latest_checkpoint(store: Store, key: str) -> Checkpoint | None:
    """The complete checkpoint with the highest step, of whatever attempt; None if there is none. One that lacks a
    file, or has one of another size, is passed over."""
    return next(iter(_complete(store, key, _listed(store, key))), None)


def fetch_checkpoint(store: Store, checkpoint: Checkpoint, folder: Path) -> None:
    """Copy a checkpoint to a local folder, which appears, or takes the place of another one, only when every file's
    sha256 was verified. One that broke off is gone on with; beside the folder nobody else may be at the same.

    Raises BadBlob after retiring a checkpoint that is torn or damaged: ask `latest_checkpoint` again.
    """
    aside = folder.with_name(f"{FETCHING}{checkpoint.step}-{checkpoint.attempt}")
    drop_fetching(folder.parent, aside)
    with clear_errors(folder.parent):
        aside.mkdir(parents=True, exist_ok=True)
        bad = {}
        for file in checkpoint.files.files:
            target = aside / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                whole = fetched(store.objects, f"{checkpoint.path}/files/{file.path}", target, file.sha256)
            except FileNotFoundError:
                bad[file.sha256] = f"({file.path} of step {checkpoint.step}) is missing"
            except OSError:  # a full disk, which is not to stay full
                shutil.rmtree(aside, ignore_errors=True)
                raise
            else:
                if not whole:
                    bad[file.sha256] = f"({file.path} of step {checkpoint.step}) holds other bytes"
        if bad:
            shutil.rmtree(aside)
            store.objects.move(f"{checkpoint.path}/complete.json", f"quarantine/{checkpoint.path}/complete.json")
            raise BadBlob(bad)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def drop_fetching(folder: Path, but: Path | None = None) -> None:
    """Remove what broke off on its way into a folder of checkpoints, where nobody is at work."""
    for aside in set(folder.glob(f"{FETCHING}*")) - {but}:
        shutil.rmtree(aside)


def sweep_fetching(cache: Path, before: float, delete: bool) -> list[int]:
    """The sizes of what broke off on its way into a work folder of the local cache, where nobody is at work and nothing
    came since `before`; `delete` removes it."""
    sizes = []
    for aside in (cache / "work").glob(f"*/*/checkpoints/{FETCHING}*"):
        with suppress(FileNotFoundError), if_free(aside.parents[1] / "lock") as free:
            stats = [path.stat() for path in (aside, *aside.rglob("*"))]
            if free and max(stat.st_mtime for stat in stats) < before:
                sizes.append(sum(stat.st_size for stat in stats if S_ISREG(stat.st_mode)))
                if delete:
                    shutil.rmtree(aside)
    return sizes


def drop_checkpoints(store: Store, key: str) -> None:
    """Delete all checkpoints of a key, once its artifact is committed."""
    _delete(store, _listed(store, key))


def _complete(store: Store, key: str, entries: list[Entry]) -> list[Checkpoint]:
    """The complete checkpoints among a key's objects, the highest step first."""
    sizes = {entry.path: entry.size for entry in entries}
    found = []
    for entry in filter(_is_record, entries):
        record = store.objects.read(entry.path)
        if record is None:
            continue
        step, attempt = _place(entry)
        files = Tree(tuple(File(*file) for file in json.loads(record.data)["files"]))
        checkpoint = Checkpoint(key, attempt, step, files)
        if all(sizes.get(f"{checkpoint.path}/files/{f.path}") == f.size for f in files.files):
            found.append(checkpoint)
    return sorted(found, key=lambda c: (c.step, c.attempt), reverse=True)


def _prune(store: Store, made: Checkpoint) -> None:
    """Delete all that is older than the newest `KEPT` complete checkpoints, torn ones of dead attempts included."""
    entries = _listed(store, made.key)
    kept = [(c.step, c.attempt) for c in _complete(store, made.key, entries)[:KEPT]]
    oldest = min([*kept, (made.step, made.attempt)])
    _delete(store, [entry for entry in entries if _place(entry) < oldest])


def _delete(store: Store, entries: list[Entry]) -> None:
    """The completion records first: what is half deleted must not look complete. Who may not delete leaves it to gc."""
    with suppress(MayNotDelete):
        for entry in sorted(entries, key=_is_record, reverse=True):
            store.objects.delete(entry.path)


def _listed(store: Store, key: str) -> list[Entry]:
    return list(store.objects.list(f"checkpoints/{key}/"))


def _place(entry: Entry) -> tuple[int, str]:
    _, _, attempt, step, _ = entry.path.split("/", 4)
    return int(step), attempt


def _is_record(entry: Entry) -> bool:
    return entry.path.endswith("/complete.json") and entry.path.count("/") == 4


def _folder(key: str, attempt: str, step: int) -> str:
    return f"checkpoints/{key}/{attempt}/{step:010d}"
