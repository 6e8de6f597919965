"""docs/runtime.md lists every setting of the runtime as the code has it.

The table in it is made from the code: `UPDATE_DOCS=1 python -m pytest tests/stages/test_runtime_docs.py`.
"""

import re
from pathlib import Path

import pytest
import yaml

from stages.runtime import Runtime, from_environment
from tests import doc_tables

PAGE = Path(__file__).parents[2] / "docs" / "runtime.md"
BY_MACHINE = {
    "store": "`~/.local/share/regrow/store`",
    "cache": "`~/.local/share/regrow/cache`",
    "workers": "one a core",
}
"""Defaults that depend on the machine, in words."""


def settings_table() -> str:
    rows = [("key", "variable", "default", "may be", "meaning")]
    for key, default, kinds, meaning in doc_tables.fields(Runtime):
        variable = "" if key == "storage_options" else f"`REGROW_{key.upper()}`"
        rows.append((f"`{key}`", variable, BY_MACHINE.get(key, default), kinds, meaning))
    return doc_tables.table(*rows)


def test_the_table_says_what_the_code_has() -> None:
    doc_tables.check(PAGE, "runtime", settings_table(), __file__)


def test_defaults_in_words_are_the_codes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    found = Runtime()
    assert BY_MACHINE["store"] == f"`{found.store.replace('/home/somebody', '~')}`"
    assert BY_MACHINE["cache"] == f"`{str(found.cache).replace('/home/somebody', '~')}`"
    told = {name for name, field in Runtime.model_fields.items() if field.default_factory} - {"storage_options"}
    assert told == BY_MACHINE.keys()


def test_its_example_is_a_runtime_and_its_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text("utf-8")
    for block in re.findall(r"```yaml\n(.*?)```", text, re.S):
        Runtime.model_validate(yaml.safe_load(block))
    exported = dict(re.findall(r"(?m)^export (REGROW_\w+)=(\S+)", text))
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    read = {f"REGROW_{field.upper()}" for field in from_environment().model_fields_set}
    assert exported and exported.keys() <= read
