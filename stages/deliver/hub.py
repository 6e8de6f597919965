"""Delivers a model to the Hugging Face Hub: a private repository unless asked otherwise, one commit a version."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.deliver.index import INDEX, index_document, refuse_another, repository
from stages.errors import UserError
from stages.identity import Json, Tree

STARTERS = {".gitattributes", "README.md"}
"""Files that a repository just made by hand may hold."""


def hub_index(to: str) -> Json:
    """The index in the repository, or None without repository or index. Raises UserError when it cannot be asked."""
    api, name = _api(to), repository(to)
    return _index(api, name)


def deliver_to_hub(
    to: str,
    tree: Tree,
    folder: Path,
    recipe: str,
    private: bool,
    go_on: Callable[[], None] = lambda: None,
    api: Any = None,
) -> None:
    """Commit the tree's files to `hf://org/name`, made if need be; `go_on` is asked between the upload and the commit.
    Raises UserError when it holds something else."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, name = api or _api(to), repository(to)
    try:
        api.create_repo(name, repo_type="model", private=private, exist_ok=True)
        there = set(api.list_repo_files(name))
        old = _index(api, name)
        if old is None and there - STARTERS:
            raise UserError(f"publish.to: {to} holds a model that regrow did not put there; choose another name")
        refuse_another(old, recipe, to)
        ours = {file.path for file in tree.files}
        index = json.dumps(index_document(tree, recipe), indent=1).encode()
        additions = [CommitOperationAdd(file.path, str(folder / file.path)) for file in tree.files]
        api.preupload_lfs_files(name, additions)  # what takes long, and nobody sees
        go_on()
        operations = [
            *additions,
            CommitOperationAdd(INDEX, index),
            *(CommitOperationDelete(path) for path in sorted(set(old["files"] if old else ()) & there - ours)),
        ]
        api.create_commit(name, operations, commit_message=f"Model {tree.digest[:12]}")
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises the errors of three HTTP libraries
        raise _told(to, error) from error


def _api(to: str) -> Any:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UserError(f"publish.to: {to} needs the Hub, and HF_HUB_OFFLINE forbids it; unset it or name a folder")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(f"publish.to: {to} needs huggingface_hub: pip install 'regrow[data]'") from error
    return HfApi()


def _index(api: Any, name: str) -> Json:
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

    try:
        return json.loads(Path(api.hf_hub_download(name, INDEX)).read_text())
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):
        return None
    except Exception as error:  # the Hub's client raises the errors of three HTTP libraries
        raise _told(f"hf://{name}", error) from error


def _told(to: str, error: Exception) -> UserError:
    """The Hub's errors are of many libraries; what they say is passed on, its token never being part of it."""
    return UserError(
        f"publish.to: {to} cannot be reached or written ({type(error).__name__}: {error}). Check the network, and that "
        "`hf auth login` or HF_TOKEN grants write access"
    )
