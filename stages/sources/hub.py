"""Models and data sets on the Hugging Face Hub, always at a commit: a branch or tag is resolved to one first.

A data set is resolved to the files of one subset and split, each by its digest, so that ten new files among a thousand
cost ten, and the same file costs nothing under another name. Which files those are is asked of the datasets library,
over a folder of empty files with the repository's names: nothing is downloaded for that but the data set's card.
Code in a repository is never run.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from stages.errors import UserError
from stages.identity import Json, canonical_json, sha256_text
from stages.sources import Found, folder
from stages.sources.digests import digests
from stages.sources.memory import recall, remember
from stages.sources.unpack import SUFFIXES, suffix_of
from stages.stage import Facts, Work

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CARDS = ("README.md", ".huggingface.yaml")
"""Files that say which files a subset has."""


def resolve_model(repository: str, revision: str, place: str) -> Found:
    """The commit that `revision` is now. Raises UserError when it cannot be found out."""
    return Found({"repository": repository, "commit": _commit(repository, revision, "model", place)})


def resolve_data(
    repository: str, revision: str, subset: str | None, split: str, place: str, cache: Path
) -> list[Found]:
    """The files of a split at the commit that `revision` is now, by digest. In `where`: name, hub and commit. What a
    commit holds is remembered in `cache`.

    Raises UserError when there is no such repository, subset or split, or when a file is of no known kind.
    """
    commit = _commit(repository, revision, "dataset", place)
    # A commit never changes, so what it holds is looked up once.
    asked = sha256_text(canonical_json([repository, commit, subset, split]))
    memory = cache / "hub" / f"{asked}.json"
    listed = recall(memory)
    if not listed:
        listed = _files(repository, commit, subset, split, place, cache)
        if not _offline():  # a local snapshot may hold less than the commit
            remember(memory, listed)
    return [
        Found({"suffix": suffix_of(path), **what}, {"name": path, "hub": repository, "commit": commit})
        for path, what in listed.items()
    ]


def _commit(repository: str, revision: str, kind: str, place: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    if _offline():
        known = _cached_repository(repository, kind) / "refs" / revision
        if known.is_file():  # what the library itself would take
            return known.read_text().strip()
        raise UserError(
            f"{place}: HF_HUB_OFFLINE is set, so the commit of {repository}@{revision} cannot be looked up: give "
            "`revision` as a full commit, or point `path`/`files` at a local copy"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().repo_info(repository, revision=revision, repo_type=kind)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{place}: cannot look up {repository}@{revision} on the Hub: {_line(error)}") from error
    assert info.sha is not None
    return str(info.sha)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _cached_repository(repository: str, kind: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}"


def _files(
    repository: str, commit: str, subset: str | None, split: str, place: str, cache: Path
) -> dict[str, dict[str, Json]]:
    """What tells the content of each of the split's files: size and sha256, or git's own digest for small ones."""
    known = _snapshot(repository, commit, place, cache) if _offline() else _siblings(repository, commit, place)
    with tempfile.TemporaryDirectory() as scratch:
        skeleton = Path(scratch) / repository.rpartition("/")[2]
        skeleton.mkdir()
        for path in known:
            _check_path(path, f"{repository}@{commit[:8]}", place)
            (skeleton / path).parent.mkdir(parents=True, exist_ok=True)
            (skeleton / path).touch()
        for card in _CARDS:
            if card in known:
                (skeleton / card).write_bytes(_fetched(repository, commit, card, place).read_bytes())
        chosen = _chosen(skeleton, subset, split, repository, place)
    _check_complete(chosen, repository, place)
    return {path: known[path] for path in chosen}


def _siblings(repository: str, commit: str, place: str) -> dict[str, dict[str, Json]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi().dataset_info(repository, revision=commit, files_metadata=True)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{place}: cannot look up {repository}@{commit} on the Hub: {_line(error)}") from error
    return {
        file.rfilename: {"size": file.size, **({"sha256": file.lfs.sha256} if file.lfs else {"git": file.blob_id})}
        for file in info.siblings or []
    }


def _snapshot(repository: str, commit: str, place: str, cache: Path) -> dict[str, dict[str, Json]]:
    """The same, of what the Hub's local cache holds."""
    home = _cached_repository(repository, "dataset") / "snapshots" / commit
    if not home.is_dir():
        raise UserError(
            f"{place}: HF_HUB_OFFLINE is set, and {repository}@{commit[:8]} is not in the local cache ({home.parent})"
        )
    paths = sorted(path for path in home.rglob("*") if path.is_file())
    known: dict[str, dict[str, Json]] = {}
    for path in paths:
        blob = path.resolve().name  # the cache names a blob by what the Hub calls it
        git = {"git": blob} if path.is_symlink() and re.fullmatch(r"[0-9a-f]{40}", blob) else {}
        known[path.relative_to(home).as_posix()] = {
            "size": path.stat().st_size,
            **(git or {"sha256": blob if re.fullmatch(r"[0-9a-f]{64}", blob) else digests([path], cache)[0]}),
        }
    return known


def _check_path(path: str, repository: str, place: str) -> None:
    if PurePosixPath(path).is_absolute() or ".." in path.split("/"):
        raise UserError(f"{place}: {repository} holds the name {path!r}, which leads out of a folder")


def _chosen(skeleton: Path, subset: str | None, split: str, repository: str, place: str) -> list[str]:
    """The paths of the split's files, as the datasets library finds them."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(skeleton), subset)
    except (OSError, ValueError, RuntimeError) as error:
        told = _line(error).replace(str(skeleton), repository)
        raise UserError(f"{place}: cannot tell what {repository} holds: {told}") from error
    found = builder.config.data_files or {}
    if split not in found:
        has = ", ".join(map(str, found)) or "none"
        raise UserError(f"{place}: {repository} has no split {split!r}: set `data_split` to one of {has}")
    root = skeleton.resolve()
    paths = [Path(path).resolve().relative_to(root).as_posix() for path in found[split]]
    for path in paths:
        if not suffix_of(path):
            raise UserError(f"{place}: {repository} holds {path}, which is none of {', '.join(SUFFIXES)}")
    return paths


def _check_complete(paths: Sequence[str], repository: str, place: str) -> None:
    """Raises UserError when files are missing by what the others' names say: `train-00003-of-00005.parquet`."""
    for path in paths:
        if match := re.search(r"-(\d{5})-of-(\d{5})", path):
            begin, end, count = path[: match.start()], path[match.end() :], int(match[2])
            for number in range(count):
                if f"{begin}-{number:05d}-of-{match[2]}{end}" not in paths:
                    raise UserError(
                        f"{place}: of {count} files of {repository}, {begin}-{number:05d}-of-{match[2]}{end} is missing"
                    )


def download(found: Mapping[str, Json], where: Mapping[str, Json]) -> Path:
    """One file of a data set, in the Hub's own cache. Raises UserError when it does not have the digest found."""
    path = _fetched(where["hub"], where["commit"], where["name"], where["name"])
    if "git" in found:
        data = path.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != found["git"]:
            raise UserError(f"{where['name']} is damaged in the Hub's cache: delete {path.resolve()} and run again")
    return path


def _fetched(repository: str, commit: str, path: str, place: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, path, revision=commit, repo_type="dataset"))
    except OSError as error:  # so are all of its errors, network and missing files alike
        raise UserError(f"{place}: cannot download {path} of {repository}@{commit[:8]}: {_line(error)}") from error


def bring_model(found: Mapping[str, Json], where: Mapping[str, Json], output: Path, work: Work) -> Facts:
    """Download the model's plain files. Raises UserError when there are no safetensors."""
    from huggingface_hub import snapshot_download

    commit, repository = found["commit"], found["repository"]
    work.tell(0, unit="files")
    try:
        held = snapshot_download(repository, revision=commit, allow_patterns=list(folder.ALLOWED))
    except OSError as error:
        raise UserError(f"cannot download {repository}@{commit}: {_line(error)}") from error
    return folder.copy(folder.listing(Path(held), f"{repository}@{commit[:8]}"), output, work)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
