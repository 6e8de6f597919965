"""Long transfers tell how far they are: to whoever watches, in both directions, up to the last byte."""

from pathlib import Path

import pytest

from stages import transfers
from stages.store import open_store
from stages.transfers import moving, watching
from tests.conftest import S3
from tests.stages.conftest import MakeAction, MakeFolder

LARGE, SMALL = 40 * 2**20, 1000


def test_both_directions_are_told_up_to_the_last_byte(
    s3: S3, tmp_path: Path, make_folder: MakeFolder, make_action: MakeAction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "LONG", 10 * 2**20)
    monkeypatch.setattr(transfers, "EVERY", 0.0)
    told: list[tuple[str, int, int]] = []
    files = {"large": bytes(LARGE), "small": bytes(SMALL)}
    with watching(lambda *heard: told.append(heard)):
        made = open_store(s3.url, tmp_path / "cache").commit(make_action(), make_folder(files), {}, {})
        open_store(s3.url, tmp_path / "elsewhere").view(made.tree)
    for what in ("uploaded", "downloaded"):
        heard = [(done, total) for which, done, total in told if which == what]
        assert heard[0] == (0, LARGE + SMALL) and heard[-1] == (LARGE + SMALL, LARGE + SMALL)
        assert heard == sorted(heard) and len(heard) > 3


def test_short_ones_are_not_worth_a_bar() -> None:
    told: list[object] = []
    with watching(lambda *heard: told.append(heard)), moving("uploaded", transfers.LONG - 1) as moved:
        moved(transfers.LONG - 1)
    assert told == []
