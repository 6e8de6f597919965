"""The record of what made an artifact: whose code counts, and the libraries' versions."""

import importlib.metadata
from pathlib import Path

from stages import evaluate, provenance
from stages.train import STAGE


def test_code_counts_however_it_is_imported(tmp_path: Path) -> None:
    files = {
        "stages/a.py": "from stages.b import (\n    one,\n    two as second,\n)\ndef f():\n    from stages import c\n",
        "stages/b/__init__.py": "",
        "stages/b/one.py": "from packing.plan import pack, other\n",
        "stages/b/two.py": "import os\nfrom stages.store import Store\n",
        "stages/c/__init__.py": "from stages.a import f\n",
        "packing/plan.py": "",
        "stages/store.py": "",
        "stages/nobody.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found: dict[str, bytes] = {}
    provenance._follow(["stages/a.py"], tmp_path.as_posix(), found)
    foundation = {"stages/store.py"}  # what every stage stands on
    assert {name: text.decode() for name, text in found.items()} == {
        name: text for name, text in files.items() if name not in {"stages/nobody.py", *foundation}
    }


def test_the_code_of_a_reward_model_that_judges_counts() -> None:
    told = [
        provenance.made_by(evaluate.STAGE, evaluate.EvaluateConfig.model_validate({"tasks": {"a": task}}))["code"]
        for task in ({"source": "x", "eval": "exact_match"}, {"source": "x", "reward_model": "judge"})
    ]
    assert provenance.plugin_module("reward_models") == "stages.reward_models"
    assert all(told)


def test_versions_are_those_that_are_installed() -> None:
    for name in (*STAGE.libraries, "no-such-library"):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "absent"
        assert provenance._library_version(name) == installed
