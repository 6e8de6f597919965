"""What the tests of fetch share: a home of their own, a model folder, and resolving and bringing one source."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages import fetch
from stages.identity import canonical_json, sha256_text
from stages.runtime import Runtime
from stages.stage import Facts, Part, Work

CSV = b"text\nhi\n"
ROW = b'{"text": "hi"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
"""What Git has in the place of a large file."""
INDEX = b'{"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}'
CACHE = Path("../cache")
"""Beside `home`, where the tests work."""
REASONING = {"reasoning_gym": "spell_backward", "size": 40, "seed": 1}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of one's own."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def model_folder(folder: Path, **extra: bytes) -> Path:
    """Files as a model folder has them; nobody loads them here."""
    folder.mkdir(parents=True)
    files = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", **extra}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def resolve(data: Any, model: Any = None, cache: Path = CACHE) -> dict[str, Part]:
    """Parts by name, for a recipe whose model is a small local folder."""
    if model is None and not Path("model").exists():
        model_folder(Path("model"))
    config = fetch.FetchConfig.model_validate({"model": model or {"path": "model"}, "data": data})
    found = {part.name: part for part in fetch.resolve(config, cache)}
    for part in found.values():
        canonical_json(dict(part.config))
    return found


def work_of(part: Part, output: Path) -> Path:
    """Where a part leaves what a later attempt may use: beside its output."""
    folder = output.parent / "work" / sha256_text(canonical_json(dict(part.config)))[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def bring(part: Part, output: Path) -> Path:
    """Run one part."""
    facts_of(part, output)
    return output


def facts_of(part: Part, output: Path) -> Facts:
    """Run one part, for what it tells."""
    output.mkdir(parents=True)
    config = fetch.FetchPart.model_validate(part.config)
    return fetch.run(config, {}, output, Work(work_of(part, output), Runtime(cache=CACHE), part.where))


def shards(data: Any) -> list[Part]:
    return [part for name, part in resolve({"mine": data}).items() if name != "model"]


def names(parts: list[Part]) -> list[str]:
    """What messages call the parts' files."""
    return [str(part.where["name"]) for part in parts]


def pieces_of(output: Path) -> list[tuple[int, bytes]]:
    """What a part was cut into: (`first` of `source.json`, the bytes of the rows)."""
    found = []
    for folder in sorted(output.iterdir()):
        (rows,) = folder.glob("rows.*")
        found.append((json.loads((folder / "source.json").read_text())["first"], rows.read_bytes()))
    return found
