"""The index of a delivery, `.regrow.json`: what was delivered, and whether all of it is there."""

from stages.identity import Json, Tree

INDEX = ".regrow.json"


def index_document(tree: Tree) -> dict[str, Json]:
    """The index of a tree that is there wholly; while its files are being written, `whole` is False."""
    files = {file.path: {"size": file.size, "sha256": file.sha256} for file in tree.files}
    return {"made_by": "regrow", "whole": True, "digest": tree.digest, "files": files}


def is_whole(index: Json, tree: Tree) -> bool:
    """Whether the index (None: there is none) says that exactly this tree was delivered."""
    return bool(index) and index["whole"] and index["digest"] == tree.digest


def some(names: list[str]) -> str:
    """The first few names of a list, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
