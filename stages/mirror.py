"""Keeps a stage's checkpoints in the store while its child process works, so that another machine can go on."""

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from stages.checkpoints import drop_checkpoints, drop_fetching, fetch_checkpoint, latest_checkpoint, save_checkpoint
from stages.identity import tree_of
from stages.store import BadBlob, Store


class Mirror:
    """Copies a stage's local checkpoints to the store while it goes on working, and back before it starts.

    A copy that fails costs that copy: the stage goes on, and its local checkpoint stays. Where saves come faster than
    the store takes them, those in between are left out.
    """

    def __init__(self, store: Store, key: str, folder: Path, note: Callable[[str], None]) -> None:
        self.store, self.key, self.folder, self.note = store, key, folder / "checkpoints", note
        self.attempt = uuid.uuid4().hex[:12]
        self.pool = ThreadPoolExecutor(1)
        self.newest = -1

    def restore(self) -> None:
        """Fetch the store's newest complete checkpoint unless this machine has a newer one, or the same bytes."""
        local = max((int(p.name) for p in self.folder.glob("*") if p.name.isdigit()), default=-1)
        while (newest := latest_checkpoint(self.store, self.key)) is not None and newest.step >= local:
            target = self.folder / str(newest.step)
            if newest.step == local and tree_of(target) == newest.files:
                break
            with suppress(BadBlob):  # it has been retired by then, and the next one is asked for
                fetch_checkpoint(self.store, newest, target)
                return
        drop_fetching(self.folder)

    def save(self, step: int, name: str) -> None:
        """Have one checkpoint folder uploaded, in the background."""
        self.newest = step
        self.pool.submit(self._upload, step, self.folder / name)

    def _upload(self, step: int, folder: Path) -> None:
        if step < self.newest:
            return
        try:
            save_checkpoint(self.store, self.key, self.attempt, step, folder)
        except Exception as error:  # of whatever kind a store and its network raise
            if step == self.newest:  # an older one may have been removed meanwhile
                self.note(f"checkpoint {step} is on this machine only, it was not copied to the store: {error}")

    def settle(self, wait: bool) -> None:
        """Upload no more; return at once, or when nothing is being uploaded."""
        self.pool.shutdown(wait=wait, cancel_futures=not wait)

    def drop(self) -> None:
        """The artifact is committed: its checkpoints have done their work."""
        drop_checkpoints(self.store, self.key)
