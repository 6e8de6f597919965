"""Delivers to a bucket, or to whatever else fsspec reaches: the index comes last and says that the rest is whole."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from stages.deliver.index import INDEX, index_document, refuse_another, some
from stages.errors import UserError
from stages.identity import Json, Tree
from stages.objects import blob_path, open_objects
from stages.sources.credentials import opened as opened_options
from stages.store import Store


def reach(to: str, options: Mapping[str, str]) -> tuple[Any, str]:
    """The file system and the path in it."""
    scheme, _, address = to.partition("://")
    if scheme in ("s3", "az", "gs"):
        try:
            opened: Any = open_objects(to, options)
        except UserError as error:
            raise UserError(f"publish.to: {error}") from error
        return opened.fs, address.strip("/")
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(to, **opened_options(options, "runtime"))
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise UserError(f"publish.to: {to}: {error or type(error).__name__}") from error
    return fs, str(root).rstrip("/")


def bucket_index(fs: Any, root: str) -> Json:
    """The index below `root`, or None. Raises UserError where it cannot be read."""
    try:
        return json.loads(fs.cat_file(f"{root}/{INDEX}"))
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise UserError(f"publish.to: {root} cannot be read: {error or type(error).__name__}") from error


def deliver_to_bucket(
    to: str, tree: Tree, store: Store, name: str, options: Mapping[str, str], go_on: Callable[[], None]
) -> None:
    """Upload the tree's files, or have the server copy them where the store lies on it. `go_on` is asked before each
    write. Raises UserError."""
    fs, root = reach(to, options)
    old = bucket_index(fs, root)
    if old is None and (foreign := [path for path in fs.find(root) if path.strip("/") != root.strip("/")]):
        raise UserError(
            f"publish.to: {to} holds files that regrow did not write ({some(foreign)}); choose another destination"
        )
    refuse_another(old, name, to)
    same_place = to.startswith("s3://") and store.url.startswith("s3://") and _same_server(fs, store)
    view = None if same_place and not store.missing(tree) else store.view(tree)
    index = index_document(tree, name)
    # Until all is there the index lists the old files too, so that an interrupted delivery leaves none behind.
    earlier = dict(old["files"]) if old else {}
    try:
        go_on()
        _write_index(fs, root, {**index, "whole": False, "files": {**earlier, **index["files"]}})
        for file in tree.files:
            go_on()
            target = f"{root}/{file.path}"
            if view is None:
                fs.cp_file(f"{store.url.removeprefix('s3://')}/{blob_path(file.sha256)}", target)
            else:
                fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                fs.put_file(str(view / file.path), target)
        for path in set(earlier) - set(index["files"]):
            go_on()
            if fs.exists(f"{root}/{path}"):
                fs.rm_file(f"{root}/{path}")
        go_on()
        _write_index(fs, root, index)
    except UserError:
        raise
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise UserError(f"publish.to: {to} cannot be written: {error}") from error


def _same_server(fs: Any, store: Store) -> bool:
    """Whether the store's bucket is reached as the destination is, so that the server itself can copy."""
    return bool(getattr(store.objects, "fs", None) and store.objects.fs.endpoint_url == fs.endpoint_url)  # type: ignore[attr-defined]


def _write_index(fs: Any, root: str, index: Json) -> None:
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{INDEX}", json.dumps(index, indent=1).encode())
