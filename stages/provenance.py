"""What made an artifact: code, libraries, machine, times. Recorded beside it, never part of its key."""

import hashlib
import importlib.metadata
import platform
import re
import time
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.identity import Json
from stages.stage import Stage, StageConfig


def provenance_of(stage: Stage[Any], config: StageConfig, run: str, started: float) -> dict[str, Json]:
    """The record of an artifact that was begun at `started` (`time.monotonic`) and is ready now."""
    return {
        "run": run,
        "host": platform.node(),
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - started, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **made_by(stage, config),
    }


def made_by(stage: Stage[Any], config: StageConfig) -> dict[str, Json]:
    """The code and libraries that would make this stage now: `plan` compares them with what made the artifact."""
    modules = [stage.home, *(plugin_module(p) for p in (stage.plugins(config) if stage.plugins else {}))]
    return {
        "code": _code_digest(tuple(modules)),
        "libraries": {name: _library_version(name) for name in stage.libraries},
    }


def plugin_module(plugin: str) -> str:
    """`format:alpaca` is the module `stages.formats.alpaca`; what is no plug-in of a kind, `stages` itself has."""
    kind, colon, name = plugin.partition(":")
    return f"stages.{kind}s.{name}" if colon else f"stages.{plugin}"


@cache
def _code_digest(modules: tuple[str, ...]) -> str:
    """Of the files of `modules` and of what they import of ours, as far as their import lines tell."""
    found: dict[str, bytes] = {}
    for module in modules:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None, module
        origin = Path(spec.origin)
        root = origin.parents[module.count(".") + (origin.name == "__init__.py")]
        own = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
        _follow([path.relative_to(root).as_posix() for path in own], root.as_posix(), found)
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + b"\0" + found[name])
    return digest.hexdigest()[:16]


_IMPORT = re.compile(rb"^ *from ((?:stages|packing)[\w.]*) import (?:\(([^()]*)\)|([^()\n]*))", re.M)

_FOUNDATION = frozenset(
    f"stages/{name}.py"
    for name in (
        *("build", "checkpoints", "child", "errors", "gc", "identity", "jobs", "lease", "manifest", "mirror"),
        *("provenance", "runtime", "stage", "store", "streams", "views"),
    )
)
"""What every stage stands on and what cannot change an artifact's bytes."""


_ENDS = (".py", "/__init__.py")


def _follow(paths: Sequence[str], root: str, found: dict[str, bytes]) -> None:
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        if path not in found and path not in _FOUNDATION and (read := _read(root, path)):
            found[path], imported = read
            waiting += imported


@cache
def _read(root: str, path: str) -> tuple[bytes, list[str]] | None:
    """A source file's bytes, and where what it imports of ours may lie; None if there is no such file.

    Paths are plain text here: a plan asks thousands of times."""
    try:
        text = Path(root, path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    imported = []
    for base, several, few in _IMPORT.findall(text):
        folder = base.decode().replace(".", "/")
        names = [name.split()[0] for name in (several or few).decode().split(",") if name.strip()]
        imported += [f"{place}{end}" for place in (folder, *(f"{folder}/{name}" for name in names)) for end in _ENDS]
    return text, imported


_VERSION = re.compile(r"^Version: *(\S+) *$", re.M)


@cache
def _library_version(name: str) -> str:
    try:
        text = importlib.metadata.distribution(name).read_text("METADATA") or ""
    except importlib.metadata.PackageNotFoundError:
        return "absent"
    found = _VERSION.search(text)  # `importlib.metadata.version` parses all of it, with the README that is in there
    return found[1] if found else importlib.metadata.version(name)
