"""Artifacts and their manifests: what came out of an action, and the JSON that records it.

A manifest's name is the key of the action it holds, its digest is that of the files it lists: whatever does not add up
when it is read is not trusted.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.identity import File, Json, Tree, canonical_json, sha256_text

_DIGEST = re.compile(r"[0-9a-f]{64}")


class BadManifest(ValueError):
    """A manifest that is not what its name says; the message is the reason."""


@dataclass(frozen=True)
class Artifact:
    """What one action made. Equal digests mean equal bytes, whoever made them."""

    action: dict[str, Json]
    """The action document that `key` is the hash of."""
    key: str
    tree: Tree
    """The files."""
    facts: dict[str, Json]
    """What the stage told people: counts, scores, seconds."""
    provenance: dict[str, Json]
    """What made it: code, libraries, host, times."""
    parts: dict[str, dict[str, str]]
    """For a whole of parts: part name to its `key` and `digest`. Empty otherwise."""

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.action["stage"])

    @property
    def digest(self) -> str:
        """The tree digest: what later keys take in."""
        return self.tree.digest


def action_path(stage: str, key: str) -> str:
    """Where the manifest of an action lies."""
    assert _DIGEST.fullmatch(key) and re.fullmatch(r"\w[\w.-]*", stage), (stage, key)
    return f"actions/{stage}/{key}.json"


def encode(artifact: Artifact) -> bytes:
    """The manifest's bytes. Raises ValueError or TypeError for facts that JSON cannot say (NaN, objects)."""
    document = {
        "action": artifact.action,
        "outputs": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in artifact.tree.files],
        "digest": artifact.digest,
        "facts": artifact.facts,
        "provenance": artifact.provenance,
        "parts": artifact.parts,
    }
    canonical_json(document)
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True).encode()


def decode(stage: str, key: str, data: bytes) -> Artifact:
    """The artifact a manifest records. Raises BadManifest."""
    try:
        document = json.loads(data)
        tree = Tree(tuple(File(f["path"], f["size"], f["sha256"]) for f in document["outputs"]))
        artifact = Artifact(
            document["action"],
            key,
            tree,
            dict(document["facts"]),
            dict(document["provenance"]),
            {name: {"key": part["key"], "digest": part["digest"]} for name, part in document["parts"].items()},
        )
        made_key = sha256_text(canonical_json(artifact.action))
        check_paths(tree)
        digest = artifact.digest
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadManifest(f"it cannot be read ({type(error).__name__}: {error})") from error
    if made_key != key or artifact.action.get("stage") != stage:
        raise BadManifest("it holds another action than its name says")
    if document["digest"] != digest:
        raise BadManifest("its files do not have the digest it records")
    return artifact


def check_paths(tree: Tree) -> None:
    """Refuse file names that would leave their folder or cannot live together. Raises ValueError."""
    folders, paths = set(), set()
    for file in tree.files:
        _check_path(file.path)
        _check_digest(file)
        if file.path in paths:
            raise ValueError(f"two files are named {file.path!r}")
        paths.add(file.path)
        folder = file.path
        while "/" in folder and (folder := folder.rpartition("/")[0]) not in folders:
            folders.add(folder)
    for path in paths & folders:
        raise ValueError(f"{path!r} is both a file and a folder")


def _check_path(path: Any) -> None:
    if not isinstance(path, str) or not path.isprintable() or "\\" in path:
        raise ValueError(f"the file name {path!r} is not plain text without backslashes")
    if any(step in ("", ".", "..") for step in path.split("/")):
        raise ValueError(f"the file name {path!r} is not a plain relative path")


def _check_digest(file: File) -> None:
    if not (isinstance(file.sha256, str) and _DIGEST.fullmatch(file.sha256) and type(file.size) is int):
        raise ValueError(f"{file.path}: no sha256 and size")


def whole_parts(parts: Mapping[str, Artifact]) -> dict[str, dict[str, str]]:
    """The parts of a whole as its manifest lists them."""
    return {name: {"key": part.key, "digest": part.digest} for name, part in sorted(parts.items())}
