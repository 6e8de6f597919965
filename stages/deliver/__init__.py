"""Delivers a published model to where people look for it: a folder, a bucket, the Hub.

An index, `.regrow.json`, lists what was delivered, so that "is it there already?" costs milliseconds and so that only
what regrow wrote is ever replaced. In a folder the new version appears at once, under its own name, or not at all; in
a bucket the index is written last and says whether the rest is whole; on the Hub one commit holds everything.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from stages.deliver.folder import deliver_to_folder, edited, local_index, refuse_foreign, sweep
from stages.deliver.index import has, is_whole
from stages.home import expanded
from stages.identity import Json, Tree, join
from stages.store import Store

__all__ = ["absolute", "deliver", "delivered", "delivery", "holds", "refuse_taken"]

PRIVATE = ("merge.json", "samples.jsonl")
"""What stays in the store: a check's figures, and answers that quote rows of the data."""


def absolute(to: str) -> str:
    """A place in the one spelling that means it wherever a command runs: a folder by its absolute path, nothing at the
    end. Empty stays empty: nowhere. Raises UserError for a home folder that is not there."""
    scheme, mark, path = to.rpartition("://")
    if scheme in ("", "file", "local"):
        folder = expanded(path, "publish.to").absolute()
        return f"{scheme}{mark}{os.path.normpath(folder)}" if path else ""
    return to.rstrip("/")


def delivery(weights: Tree, card: Tree) -> Tree:
    """What is delivered: the model's files and the card's. Of two with one name the card's counts."""
    return join([_model(weights, card), Tree(tuple(file for file in card.files if file.path not in PRIVATE))])


def _model(weights: Tree, card: Tree) -> Tree:
    named = {file.path for file in card.files} | set(PRIVATE)
    return Tree(tuple(file for file in weights.files if file.path not in named))


def delivered(to: str, tree: Tree, options: Mapping[str, str] | None = None) -> bool:
    """Whether exactly this is there already, by the index and, in a folder, by sizes and times. Hashes nothing."""
    index = _index(to, options or {})
    return is_whole(index, tree) and not _edited(to, index)


def holds(to: str, weights: Tree, card: Tree, options: Mapping[str, str] | None = None) -> bool:
    """Whether this model is there already, with that card or another one of its own. Looks as `delivered`."""
    index = _index(to, options or {})
    return has(index, _model(weights, card)) and not _edited(to, index)


def _index(to: str, options: Mapping[str, str]) -> Json:
    if to.startswith("hf://"):
        from stages.deliver.hub import hub_index

        return hub_index(to)
    if "://" in to:
        from stages.deliver.bucket import bucket_index, reach

        return bucket_index(*reach(to, options))
    return local_index(_folder(to))


def _edited(to: str, index: Json) -> bool:
    return "://" not in to and bool(edited(_folder(to), index))


def refuse_taken(to: str, name: str) -> None:
    """What can be told of a folder before anything is trained for it. Raises UserError when what stands there is not to
    be replaced by a model of the recipe called `name`."""
    if to and "://" not in to:
        refuse_foreign(_folder(to), name)


def deliver(
    to: str,
    tree: Tree,
    store: Store,
    name: str,
    *,
    private: bool = True,
    options: Mapping[str, str] | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Put the tree's files there, replacing what regrow delivered earlier for the recipe of that `name`; nothing
    happens when it is there already.

    `to` is a folder, an fsspec URL, or `hf://org/name` (`private` counts only there); `options` are for
    its service. `go_on` is called before what others would see, and raises where it must not come to that any more.
    Raises UserError when something else stands there, or when the place cannot be reached or written;
    BadBlob when the store's bytes turn out damaged.
    """
    if "://" not in to:
        sweep(_folder(to))
    if delivered(to, tree, options):
        return
    if to.startswith("hf://"):
        from stages.deliver.hub import deliver_to_hub

        deliver_to_hub(to, tree, store.view(tree), name, private, go_on)
    elif "://" in to:
        from stages.deliver.bucket import deliver_to_bucket

        deliver_to_bucket(to, tree, store, name, options or {}, go_on)
    else:
        deliver_to_folder(_folder(to), tree, store.view(tree), name, go_on)


def _folder(to: str) -> Path:
    return Path(absolute(to))
