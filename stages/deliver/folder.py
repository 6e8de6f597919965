"""Delivers to a local folder: the new version appears at once under its name, or not at all."""

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from stages.deliver.index import INDEX, index_document, refuse_another, some
from stages.errors import UserError
from stages.identity import Json, Tree
from stages.objects.folder import copy_file

LOCK = ".lock"
"""Ends the name of a folder's lock."""


def local_index(folder: Path) -> Json:
    """The folder's index, or None. Raises UserError for one that cannot be read."""
    try:
        return json.loads((folder / INDEX).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{folder / INDEX}: is not regrow's index any more; move the folder away") from error


def edited(folder: Path, index: Json) -> list[str]:
    """Files of a delivery that were changed or removed since, by size and modification time."""
    changed = []
    for path, file in index["files"].items():
        try:
            found = (folder / path).stat()
        except FileNotFoundError:
            changed.append(path)
            continue
        if (found.st_size, found.st_mtime_ns) != (file["size"], file["modified_ns"]):
            changed.append(path)
    return changed


def deliver_to_folder(
    folder: Path, tree: Tree, view: Path, name: str, go_on: Callable[[], None] = lambda: None
) -> None:
    """Copy a view's files there; `go_on` is asked before the folder is put in place. Raises UserError when that would
    lose what regrow did not write, or cannot be done."""
    refuse_foreign(folder, name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _aside(folder) as aside:
            index = index_document(tree, name)
            for file in tree.files:
                target = aside / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                # Copied (or its blocks shared), never hard-linked: who edits a delivered file must not edit the store.
                copy_file(view / file.path, target)
                _sync(target)
                index["files"][file.path]["modified_ns"] = target.stat().st_mtime_ns
            (aside / INDEX).write_text(json.dumps(index, indent=1))
            _sync(aside / INDEX)
            _sync(aside)
            go_on()
            _put_in_place(aside, folder)
            _sync(folder.parent)
    except OSError as error:
        raise UserError(f"publish.to: {folder} cannot be written: {error.strerror or error}") from error


def refuse_foreign(folder: Path, name: str) -> None:
    """Raise UserError when replacing the folder would lose what regrow did not write there."""
    if not folder.exists():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise UserError(f"publish.to: {folder} is no folder; choose another destination or move it away")
    if folder.is_mount():
        raise UserError(
            f"publish.to: {folder} is a mount point, and a new version takes the place of the whole folder: name a "
            "folder inside it"
        )
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    if not there:
        return
    index = local_index(folder)
    if index is None:
        raise UserError(
            f"publish.to: {folder} holds files that regrow did not write ({some(sorted(there))}); "
            "choose another destination or move them away"
        )
    refuse_another(index, name, str(folder))
    added = sorted(there - set(index["files"]) - {INDEX})
    changed = sorted(set(edited(folder, index)) & there)
    if added or changed:
        raise UserError(
            f"publish.to: in {folder}, {some(added + changed)} came in or changed after regrow wrote there; "
            "move the folder away to keep that, or delete it"
        )


def sweep(folder: Path) -> None:
    """Remove what killed deliveries left beside the folder: half a new version, or the whole of an old one."""
    for name in {path.name.removesuffix(LOCK) for path in folder.parent.glob(f".{folder.name}.delivery-*")}:
        left = folder.with_name(name)
        with suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A hidden folder beside the destination, removed when done."""
    aside = folder.parent / f".{folder.name}.delivery-{uuid4().hex}"
    with _locked(aside):
        aside.mkdir()
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder's lock, which its holder's death releases. Raises BlockingIOError when another has it."""
    beside = folder.with_name(f"{folder.name}{LOCK}")
    handle = os.open(beside, os.O_RDWR | os.O_CREAT)  # NFS locks only what is open for writing: no folder
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _put_in_place(aside: Path, folder: Path) -> None:
    """Give the finished folder its name; one that stands there takes the hidden name in the same instant."""
    if not folder.exists():
        aside.rename(folder)
        return
    if not _exchange(aside, folder):
        # Without an atomic exchange there is a moment without the folder, but never half a one.
        old = aside.with_name(f"{aside.name}-old")
        folder.rename(old)
        aside.rename(folder)
        old.rename(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically (Linux renameat2); False where the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_cwd, exchange = -100, 2
    if rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
