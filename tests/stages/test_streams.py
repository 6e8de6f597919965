"""Streamed inputs: what is asked for is there, what is not leaves the disk, and what is damaged is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.build import Built, build
from stages.identity import Action, Tree, tree_of
from stages.objects import blob_path
from stages.runtime import Runtime
from stages.store import BadBlob, Store, open_store

TOYS = Path(__file__).parent / "toys"
NAMES = [f"data/{number:05}" for number in range(6)]


@pytest.fixture(autouse=True)
def _toys_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TOYS}:{Path(__file__).parents[2]}")
    monkeypatch.syspath_prepend(str(TOYS))


def stored(store: Store, folder: Path, texts: dict[str, str]) -> Tree:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    tree = tree_of(folder)
    return store.commit(Action("rows", {"rows": 1}, {"digest": tree.digest}, {}), folder, {}, {}).tree


class Machine:
    """A store, a machine with an empty cache, and the toy's inputs."""

    def __init__(self, url: str, folder: Path) -> None:
        maker = open_store(url, folder / "maker")
        self.rows = stored(maker, folder / "rows", {f"{name}/rows.txt": f"rows of {name}" for name in NAMES})
        self.kept = stored(maker, folder / "kept", {"kept.txt": f"rows of {NAMES[2]}"})  # a blob of the rows
        self.runtime = Runtime(store=url, cache=folder / "cache")
        self.store = open_store(url, folder / "cache")

    def stream(self, order: list[str]) -> Built:
        import stream_stage  # type: ignore[import-not-found]

        config = stream_stage.StreamConfig(order=tuple(order))
        return build(stream_stage.STAGE, config, {"rows": self.rows, "kept": self.kept}, self.store, self.runtime)

    def seen(self, built: Built) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.store.view(built.artifact.tree) / "seen.json").read_text())
        return found


@pytest.mark.parametrize("shared_url", ["folder", "s3"], indirect=True)
def test_two_are_on_the_disk_and_the_others_are_not(shared_url: str, tmp_path: Path, request: Any) -> None:
    machine = Machine(shared_url, tmp_path)
    order = [*NAMES, *NAMES[:2], NAMES[1]]
    seen = machine.seen(machine.stream(order))
    assert [each["read"] for each in seen] == [f"rows of {name}" for name in order]
    for each, now, then in zip(seen, order, [*order[1:], NAMES[1]], strict=True):
        assert f"{now}/rows.txt" in each["there"]
        assert {*each["there"]} <= {f"{now}/rows.txt", f"{then}/rows.txt"}
        assert each["kept"] == f"rows of {NAMES[2]}", "a blob went that something else shows"
        assert each["cached"] <= (3 if shared_url.startswith("s3:") else 0), "two, and the one that a view shows"
    assert not list((tmp_path / "cache" / "work").rglob("rows.txt"))


def test_a_damaged_part_is_quarantined_and_told(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path / "store"), tmp_path)
    bad = machine.rows.files[3]
    path = machine.store.objects.local(blob_path(bad.sha256))
    assert path is not None
    path.unlink()
    path.write_text("x" * bad.size)
    with pytest.raises(BadBlob, match="holds other bytes") as error:
        machine.stream(NAMES)
    assert error.value.blobs == {bad.sha256}
    assert machine.store.missing(machine.rows), "it grows back"
    assert machine.seen(machine.stream(NAMES[:3]))[2]["read"] == f"rows of {NAMES[2]}"
