"""Data sets of the Hugging Face Hub, by the real client: a server on the loopback gives what the Hub would.

The client reads its address when it is imported, so each run of fetch is a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.stages.web_server import Page, Web, web_server

ROOT = Path(__file__).parents[2]
FIRST, SECOND = "1" * 40, "2" * 40
CARD = """---
configs:
- config_name: chat
  data_files:
  - split: train
    path: chat/train-*
  - split: test
    path: chat/test.parquet
- config_name: other
  data_files: other/*.csv
---
# A data set
"""
SCRIPT = """
import json, os, sys
from pathlib import Path
from stages import fetch
from stages.errors import UserError
from stages.runtime import Runtime
from stages.sources import hub
from stages.stage import Part, Work

out, cache = Path(sys.argv[1]), Path(sys.argv[3])
told = []
for number, data in enumerate(json.loads(sys.argv[2])):
    try:
        found = hub.resolve_data(
            data["hub"],
            data.get("revision", "main"),
            data.get("subset"),
            data.get("split", "train"),
            "place",
            cache,
        )
        parts = [{"found": dict(one.identity), "where": dict(one.where)} for one in found]
        for index, part in enumerate(parts):
            folder = out / f"{number}-{index}"
            (folder / "work").mkdir(parents=True)
            (folder / "out").mkdir()
            config = fetch.FetchPart(kind="file", found=part["found"], source="mine", split="train")
            fetch.run(config, {}, folder / "out", Work(folder / "work", Runtime(cache=cache), part["where"]))
            part["pieces"] = sorted(path.name for path in (folder / "out").glob("*/rows.*"))
        told.append(parts)
    except UserError as error:
        told.append(str(error))
print(json.dumps(told))
print(sorted({"datasets", "torch"} & set(sys.modules)), flush=True)
os._exit(0)  # as the process of a stage ends: pyarrow may abort at the end of one that has read Parquet
"""


def parquet(first: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(first, first + 3)]}), sink)
    return bytes(sink.getvalue())


FILES = {
    "README.md": CARD.encode(),
    "chat/train-00000-of-00002.parquet": parquet(0),
    "chat/train-00001-of-00002.parquet": parquet(3),
    "chat/test.parquet": parquet(9),
    "other/a.csv": b"text\nhi\n",
    "picture.png": b"png",
}


def serve(web: Web, name: str, commit: str, files: Mapping[str, bytes]) -> None:
    """Put a repository at a commit, which is then its main."""
    siblings: list[dict[str, Any]] = []
    for path, data in files.items():
        sha256 = hashlib.sha256(data).hexdigest()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        large = path.endswith(".parquet")
        lfs = {"lfs": {"sha256": sha256, "size": len(data), "pointerSize": 130}} if large else {}
        siblings.append({"rfilename": path, "size": len(data), "blobId": git, **lfs})
        headers = {"ETag": f'"{sha256 if large else git}"', "X-Repo-Commit": commit}
        web.pages[f"/datasets/{name}/resolve/{commit}/{path}"] = Page(data, headers)
    about = json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
    for revision in ("main", commit):
        web.pages[f"/api/datasets/{name}/revision/{revision}"] = Page(about, {"Content-Type": "application/json"})


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as server:
        yield server


def fetched(web: Web, tmp_path: Path, name: str, *data: dict[str, Any], **environment: str) -> tuple[list[Any], str]:
    """Resolve and bring; what was found, and which heavy libraries that took."""
    cache = tmp_path / environment.pop("cache", "cache")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / name), json.dumps(data), str(cache)]
    settings = {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": web.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr
    told, heavy = done.stdout.strip().splitlines()[-2:]
    return json.loads(told), heavy


def test_a_data_set_is_the_files_of_one_split_by_digest(web: Web, tmp_path: Path) -> None:
    serve(web, "org/set", FIRST, FILES)
    serve(web, "org/cut", FIRST, {name: data for name, data in FILES.items() if "00000" not in name})
    serve(web, "org/evil", FIRST, {**FILES, "../evil.jsonl": b"{}"})
    [train, other, *refused], _ = fetched(
        web,
        tmp_path,
        "first",
        {"hub": "org/set", "subset": "chat"},
        {"hub": "org/set", "subset": "other"},
        {"hub": "org/set", "subset": "chat", "split": "validation"},
        {"hub": "org/set", "subset": "nothing"},
        {"hub": "org/nothing"},
        {"hub": "org/cut", "subset": "chat"},
        {"hub": "org/evil", "subset": "chat"},
    )
    assert not isinstance(train, str), train
    assert [part["found"] for part in train] == [
        {"suffix": ".parquet", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in FILES.items()
        if name.startswith("chat/train")
    ]
    assert [part["pieces"] for part in train] == [["rows.arrow"]] * 2
    assert train[0]["where"] == {
        "name": "chat/train-00000-of-00002.parquet",
        "hub": "org/set",
        "commit": FIRST,
    }
    assert set(other[0]["found"]) == {"suffix", "size", "git"} and other[0]["pieces"] == ["rows.csv"]
    for told, says in zip(
        refused,
        (
            "org/set has no split 'validation': set `data_split` to one of train, test",
            "nothing",
            "cannot look up org/nothing@main on the Hub",
            "of 2 files of org/cut, chat/train-00000-of-00002.parquet is missing",
            "holds the name '../evil.jsonl', which leads out of a folder",
        ),
        strict=True,
    ):
        assert isinstance(told, str) and says in told and told.startswith("place: ")

    # A new commit with one file more: the others are the same, and are not downloaded again.
    more = {name.replace("-of-00002", "-of-00003"): data for name, data in FILES.items()}
    serve(web, "org/set", SECOND, {**more, "chat/train-00002-of-00003.parquet": parquet(6)})
    web.asked.clear()
    [grown], _ = fetched(web, tmp_path, "second", {"hub": "org/set", "subset": "chat"})
    assert [part["found"] for part in grown[:2]] == [part["found"] for part in train] and len(grown) == 3
    # Nothing is asked for a commit that was looked at before, and the datasets library is not imported.
    web.asked.clear()
    pinned = {"hub": "org/set", "subset": "chat", "revision": SECOND}
    [again], heavy = fetched(web, tmp_path, "third", pinned)
    assert again == grown and heavy == "[]" and not [path for path, _ in web.asked if path.startswith("/api")]

    # Where that memory is damaged, or cannot be kept, it is looked up again.
    for memory in (tmp_path / "cache" / "hub").iterdir():
        memory.write_text("{")
    (tmp_path / "file").touch()
    for cache in ("cache", "file/cache"):
        [again], _ = fetched(web, tmp_path, f"with a {cache.partition('/')[0]}", pinned, cache=cache)
        assert again == grown

    # Offline, what the Hub's local cache holds is enough, and its digests are the same. It must hold the whole subset.
    rest, _ = fetched(web, tmp_path, "rest", {**pinned, "split": "test"}, {**pinned, "subset": "other"})
    assert not any(isinstance(told, str) for told in rest), rest
    offline = {"HF_HUB_OFFLINE": "1", "cache": "fresh", "HF_ENDPOINT": "http://127.0.0.1:1"}
    [held, missing], _ = fetched(web, tmp_path, "fourth", pinned, {"hub": "org/set", "subset": "other"}, **offline)
    assert not isinstance(held, str), held
    assert [part["found"] for part in held] == [part["found"] for part in grown]
    assert isinstance(missing, str)
    # What is damaged there is told.
    blob = next((tmp_path / "hf/hub/datasets--org--set/blobs").glob(f"{grown[2]['found']['sha256']}*"))
    blob.chmod(0o644)
    blob.write_bytes(parquet(9))
    [damaged], _ = fetched(web, tmp_path, "fifth", pinned, **offline)
    assert "chat/train-00002-of-00003.parquet changed" in damaged
