"""Whole recipes with less than all rights on the bucket."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.plan import make_plan, require_writable
from flows.promotion import rollback
from stages.errors import UserError
from stages.production import production
from stages.store import open_store
from tests.conftest import READER, S3, WORKER
from tests.flows.rehearsal import Rehearsal


def become(monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]) -> None:
    for name, value in zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), pair, strict=True):
        monkeypatch.setenv(name, value)


def test_a_worker_that_may_not_delete_runs_promotes_and_rolls_back(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.forbid_deleting()
    become(monkeypatch, WORKER)
    rehearsal = Rehearsal(tmp_path, s3.url)
    first, outcome = rehearsal.run(10)
    assert outcome.production == "moved" and rehearsal.to_run(10) == []
    assert rehearsal.run(20)[1].production == "moved"
    assert rollback(rehearsal.store, first.runtime, "bot").what == "rolled back"
    standing = production(rehearsal.store, "bot")
    assert standing is not None and standing.now.run == first.id


def test_a_reader_uses_what_is_there_and_is_told_what_would_have_to_run(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal = Rehearsal(tmp_path, s3.url)
    rehearsal.run(10)
    run, _ = rehearsal.run(20)
    become(monkeypatch, READER)
    reader = Rehearsal(tmp_path, s3.url)
    reader.__dict__["store"] = open_store(s3.url, tmp_path / "cache", read_only=True)
    for right, told in ((20, ""), (30, "train would have to run (train.seed 20 → 30), and s3://")):
        this = reader.start(right)
        this.runtime = run.runtime.model_copy(update={"read_only": True})
        plan = make_plan(this)
        if not told:
            require_writable(this, plan)
            continue
        with pytest.raises(UserError) as refused:
            require_writable(this, plan)
        assert str(refused.value).startswith(told) and "read-only (REGROW_READ_ONLY)" in str(refused.value)
    monkeypatch.setenv("REGROW_READ_ONLY", "1")
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
    shown = CliRunner().invoke(app, ["history", "bot", "--store", s3.url], catch_exceptions=False)
    assert shown.exit_code == 0 and "bot/production names" in shown.stdout
    with pytest.raises(UserError, match="is used read-only"):
        CliRunner().invoke(app, ["rollback", "bot", "--store", s3.url], catch_exceptions=False)
