"""The index of a delivery, `.regrow.json`: what was delivered, and whether all of it is there."""

from stages.errors import UserError
from stages.identity import Json, Tree

INDEX = ".regrow.json"


def index_document(tree: Tree, name: str) -> dict[str, Json]:
    """The index of a tree that is there wholly, delivered for the recipe called `name`; while its files are being
    written, `whole` is False."""
    files = {file.path: {"size": file.size, "sha256": file.sha256} for file in tree.files}
    return {"made_by": "regrow", "name": name, "whole": True, "digest": tree.digest, "files": files}


def refuse_another(index: Json, name: str, to: str) -> None:
    """Raise UserError where the model of a recipe with another name was delivered: an experiment under a name of its
    own would take the place of what is served."""
    holder = (index or {}).get("name") or name
    if holder != name:
        raise UserError(
            f"publish.to: {to} holds the model of the recipe `{holder}`, and this one is `{name}`: choose another "
            "destination, or delete what is there"
        )


def is_whole(index: Json, tree: Tree) -> bool:
    """Whether the index (None: there is none) says that exactly this tree was delivered."""
    return bool(index) and index["whole"] and index["digest"] == tree.digest


def has(index: Json, tree: Tree) -> bool:
    """Whether the index (None: there is none) says that these files were delivered, whatever else was."""
    if not index or not index["whole"]:
        return False
    there = {path: file["sha256"] for path, file in index["files"].items()}
    return all(there.get(file.path) == file.sha256 for file in tree.files)


def some(names: list[str]) -> str:
    """The first few names of a list, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def repository(to: str) -> str:
    """The Hub's name for `hf://organisation/name`. Raises UserError."""
    name = to.removeprefix("hf://").strip("/")
    if name.count("/") != 1:
        raise UserError(f"publish.to: {to}: expected hf://organisation/name")
    return name
