"""Where the runtime's settings come from, and what is said of one that nothing reads."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from flows.cli import app
from flows.options import runtime_of
from stages.errors import UserError
from stages.runtime import Runtime, from_environment, store_of
from tests.stages.fetching import model_folder


def test_settings_win_over_variables_and_these_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_EVAL_BATCH", "8")
    assert from_environment().eval_batch == 8
    assert from_environment({"eval_batch": 4}).eval_batch == 4
    monkeypatch.delenv("REGROW_EVAL_BATCH")
    assert from_environment().eval_batch == Runtime.model_fields["eval_batch"].default


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("REGROW_MICROBATCH", "did you mean REGROW_MICRO_BATCH?"),
        ("REGROW_SAVE_SECOND", "did you mean REGROW_SAVE_SECONDS?"),
        ("REGROW_STORAGE_OPTIONS", "write it into a file for --runtime"),
    ],
)
def test_a_variable_that_nothing_reads_is_said(variable: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "{}")
    with pytest.raises(UserError) as error:
        from_environment()
    assert variable in str(error.value) and said in str(error.value)


def test_a_value_that_does_not_fit_is_told_by_the_variables_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_MICRO_BATCH", "0")
    with pytest.raises(
        UserError, match=r"^runtime `micro_batch`: .* equal to 1; or: .*'auto' \(from REGROW_MICRO_BATCH"
    ):
        runtime_of(None, None)


def test_variables_of_others_that_begin_alike_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_S3_KEY", "1")
    monkeypatch.setenv("REGROW_DATABASE", "postgresql://localhost/x")
    from_environment()


@pytest.mark.parametrize("settings", [{"lease_seconds": "inf"}, {"vllm_url": "http://ada:hunter2@host:8000"}])
def test_what_cannot_be_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=r"finite|the URL carries a secret"):
        Runtime.model_validate(settings)


def test_a_store_without_a_name_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--store "$STORE"` with the variable unset: the usual store would be another one."""
    monkeypatch.setenv("REGROW_STORE", str(tmp_path))
    with pytest.raises(UserError, match="names no place"):
        store_of(runtime_of("", None))


def test_a_cache_in_the_home_folder_is_there_wherever_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runtime.yaml").write_text("cache: ~/named\n")
    assert runtime_of(None, tmp_path / "runtime.yaml").cache == tmp_path / "named"
    monkeypatch.setenv("REGROW_CACHE", "~/named")
    assert runtime_of(None, None).cache == tmp_path / "named"
    monkeypatch.setenv("REGROW_CACHE", "~nobody-at-all/cache")
    with pytest.raises(UserError, match=r"~nobody-at-all/cache: there is no such home folder.*REGROW_CACHE"):
        runtime_of(None, None)


def test_a_cache_without_a_name_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REGROW_CACHE", "")
    with pytest.raises(UserError, match=r"runtime `cache`: names no folder.*REGROW_CACHE"):
        runtime_of(None, None)
    (tmp_path / "runtime.yaml").write_text("cache: ''\n")
    with pytest.raises(UserError, match=r"runtime `cache`: names no folder.*runtime\.yaml"):
        runtime_of(None, tmp_path / "runtime.yaml")


def test_files_are_remembered_in_the_cache_that_a_file_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    model = model_folder(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for path in (*model.iterdir(), tmp_path / "rows.jsonl"):
        os.utime(path, (1e9, 1e9))  # longer ago than a digest must be to be remembered
    fetch = {"model": {"path": str(model)}, "data": {"rows": {"files": str(tmp_path / "rows.jsonl")}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"name": "a", "fetch": fetch}))
    (tmp_path / "runtime.yaml").write_text(f"cache: {tmp_path}/scratch\nstore: {tmp_path}/store\n")
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml"), "--runtime", str(tmp_path / "runtime.yaml")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "scratch" / "digests.json").exists() and not (tmp_path / "home").exists()
