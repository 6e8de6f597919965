"""Identity: canonical JSON, digests, and the key of an action.

`key = sha256(canonical JSON of {schema, stage, version, config, inputs})`. Keys say what was asked for; an artifact's
tree digest says what came out. Inputs enter a key by their tree digests, so a stage that grows back byte-identical
stops the rerun there.
"""

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

Json = Any
"""Anything JSON can say: None, bool, int, float, str, list, dict."""

SCHEMA = 1
"""Version of the key's own form."""

HASHERS = 4
"""Files that are hashed side by side."""


def canonical_json(value: Json) -> str:
    """The one text of a JSON value: sorted keys, no spaces, plain UTF-8.

    Raises ValueError for NaN, infinities and lone surrogates, and TypeError for whatever has no stable form (sets,
    paths, objects, keys that are not strings), naming where it stands.
    """
    _refuse_unstable(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _refuse_unstable(value: Json, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}: a number that enters a key must be finite")
    if isinstance(value, dict):
        for name, item in value.items():
            if type(name) is not str:
                raise TypeError(f"{place} has the key {name!r}: keys must be strings")
            _refuse_unstable(item, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _refuse_unstable(item, f"{place}[{number}]")
    elif type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{place} holds half of a character (a lone surrogate): it has no UTF-8 form") from None
    elif not (value is None or type(value) in (bool, int, float)):
        raise TypeError(f"{place} is a {type(value).__name__}: it has no stable JSON form")


def sha256_text(text: str) -> str:
    """Hex digest of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, order=True)
class File:
    """One file of an artifact: its relative path with forward slashes, its size in bytes, its sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Tree:
    """A set of files with a digest: what an artifact holds, or what a stage takes of it."""

    files: tuple[File, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 over the sorted `(path, size, sha256)` of the files."""
        return sha256_text(canonical_json(sorted([f.path, f.size, f.sha256] for f in self.files)))

    @property
    def size(self) -> int:
        """Total bytes."""
        return sum(f.size for f in self.files)

    def select(self, *patterns: str, strip: str = "") -> "Tree":
        """The files whose path matches any glob (`*` crosses folders), with the prefix `strip` removed."""
        return Tree(
            tuple(
                File(f.path.removeprefix(strip), f.size, f.sha256)
                for f in self.files
                if any(fnmatch.fnmatchcase(f.path, p) for p in patterns)
            )
        )

    def folder(self, prefix: str) -> "Tree":
        """The files under `prefix/`, seen from there."""
        return self.select(f"{prefix}/*", strip=f"{prefix}/")

    def folders(self) -> dict[str, "Tree"]:
        """The files of each folder that holds any, seen from there, by the folder's path, sorted. One pass, where
        `folder` would look at every file for each of thousands of shards."""
        found: dict[str, list[File]] = {}
        for file in sorted(self.files):
            folder, _, name = file.path.rpartition("/")
            found.setdefault(folder, []).append(File(name, file.size, file.sha256))
        return {folder: Tree(tuple(found[folder])) for folder in sorted(found)}

    def under(self, prefix: str) -> "Tree":
        """The same files, moved below `prefix/`."""
        return Tree(tuple(File(f"{prefix}/{f.path}", f.size, f.sha256) for f in self.files))


def join(trees: Iterable[Tree]) -> Tree:
    """One tree of all files. Two files with one path are an error of the caller."""
    files = tuple(sorted(f for tree in trees for f in tree.files))
    assert len({f.path for f in files}) == len(files), "two files with one path"
    return Tree(files)


def tree_of(folder: Path) -> Tree:
    """The tree of a local folder's regular files. Raises ValueError for links and other special files."""
    paths = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is not a plain file: an artifact holds only plain files")
        if path.is_file():
            paths.append((path, path.stat().st_size))  # before it is hashed: one that still grows will be told by it
    with ThreadPoolExecutor(HASHERS) as pool:  # hashing lets go of the interpreter lock
        digests = pool.map(sha256_file, [path for path, _ in paths])
        return Tree(
            tuple(
                File(path.relative_to(folder).as_posix(), size, digest)
                for (path, size), digest in zip(paths, digests, strict=True)
            )
        )


@dataclass(frozen=True)
class Action:
    """What was asked for: the document that a key is the hash of."""

    stage: str
    version: Mapping[str, int]
    """The stage's own version under its name, and one entry a plug-in used."""
    config: Mapping[str, Json]
    inputs: Mapping[str, str]
    """Input name to tree digest."""

    @property
    def document(self) -> dict[str, Json]:
        """The action as JSON, the way it is hashed and stored."""
        return {
            "schema": SCHEMA,
            "stage": self.stage,
            "version": dict(self.version),
            "config": dict(self.config),
            "inputs": dict(self.inputs),
        }

    @cached_property
    def key(self) -> str:
        """sha256 of the canonical JSON of the document."""
        return sha256_text(canonical_json(self.document))
