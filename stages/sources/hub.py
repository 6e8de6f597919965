"""Models and data sets on the Hugging Face Hub, always at a commit: a branch or tag is resolved to one first."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.identity import Json
from stages.sources import Found, folder
from stages.stage import Facts, Work

_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_model(repository: str, revision: str, place: str) -> Found:
    """The commit that `revision` is now. Raises UserError when it cannot be found out."""
    return Found({"repository": repository, "commit": _commit(repository, revision, "model", place)})


def resolve_data(repository: str, revision: str, subset: str | None, split: str, place: str) -> Found:
    """The commit that `revision` is now, with what to take from it."""
    commit = _commit(repository, revision, "dataset", place)
    return Found({"repository": repository, "commit": commit, "subset": subset, "data_split": split})


def _commit(repository: str, revision: str, kind: str, place: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
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


def bring_data(found: Mapping[str, Json], where: Mapping[str, Json], output: Path, work: Work) -> Facts:
    """Write one split of a data set as `rows.parquet`. Code in the repository is never run."""
    import datasets

    repository, commit = found["repository"], found["commit"]
    work.tell(0, unit="rows")
    try:
        rows: Any = datasets.load_dataset(
            repository, found["subset"], split=found["data_split"], revision=commit, verification_mode="all_checks"
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read {repository}@{commit}: {_line(error)}") from error
    rows.to_parquet(str(output / "rows.parquet"))
    work.tell(len(rows), len(rows), "rows")
    return {"rows": len(rows)}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
