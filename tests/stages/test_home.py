"""`~` before a name that is no user's, wherever a path is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.models import choose
from flows.recipe import load
from flows.run import start
from flows.stored import recipe_of
from flows.up import home_of
from stages.errors import UserError
from stages.home import expanded
from stages.runtime import Runtime, store_of

NOBODY = "~nobody-at-all/it"
RECIPE = "name: mine\nfetch: {{model: {{path: {model}}}, data: {{rows: {{files: {folder}/rows.jsonl}}}}}}\n"


@pytest.mark.parametrize(
    "setting",
    [
        f"fetch.data.rows.files={NOBODY}.jsonl",
        f"fetch.model.path={NOBODY}",
        f"fetch.reward_models={{judge: {{path: {NOBODY}}}}}",
        f"convert.template={NOBODY}.jinja",
        f"convert.format={NOBODY}.py",
        f"publish.to={NOBODY}",
    ],
)
def test_a_recipe_that_names_nobodys_home_is_refused(setting: str, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model, folder=tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    runtime = Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r": ~nobody-at-all/it\S*: there is no such home folder"):
        start(load(tmp_path / "recipe.yaml", [setting]), runtime, store_of(runtime))


@pytest.mark.parametrize(
    "named",
    [
        lambda runtime: store_of(runtime.model_copy(update={"store": NOBODY})),
        lambda runtime: store_of(runtime.model_copy(update={"store": NOBODY, "read_only": True})),
        lambda runtime: choose(NOBODY, (), store_of(runtime), runtime),
        lambda runtime: recipe_of(f"{NOBODY}.yaml", (), store_of(runtime)),
        lambda _: home_of(Path(NOBODY)),
    ],
    ids=["store", "read-only store", "model", "recipe", "home"],
)
def test_a_command_that_names_nobodys_home_is_refused(named: Callable[[Runtime], Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such home folder"):
        named(Runtime(store=str(tmp_path / "store"), cache=tmp_path / "cache"))


def test_a_file_whose_name_begins_so_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~backup.jsonl").touch()
    assert expanded("~backup.jsonl", "files") == Path("~backup.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/rows.jsonl", "files") == tmp_path / "rows.jsonl"
