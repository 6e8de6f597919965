"""docs/options.md has every option of objectives, rewards and environments; docs/objectives.md what goes with them.

The tables are made from the code: `UPDATE_DOCS=1 python -m pytest tests/stages/test_options_docs.py`.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from stages import environments, objectives, rewards
from stages.objectives import dpo
from stages.objectives.grpo import GroupOptions, RewardedOptions, SampledOptions
from stages.rewards import RewardChoice
from tests import doc_tables

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "options.md"
OBJECTIVES = (DOCS / "objectives.md").read_text("utf-8")
SHARED: Mapping[str, type[Any]] = {
    "Writing completions": SampledOptions,
    "Learning from rewards": RewardedOptions,
    "Comparing within a group": GroupOptions,
}
"""What several objectives have in common, each with all that stands before it."""


def options_table(options: type[Any], without: Collection[str] = ()) -> str:
    rows = [(f"`{key}`", *rest) for key, *rest in doc_tables.fields(options, without)]
    return doc_tables.table(("option", "default", "may be", "meaning"), *rows) if rows else "None of its own."


def shared_by(options: type[Any]) -> list[str]:
    return [title for title, kind in SHARED.items() if issubclass(options, kind)]


def objectives_sections() -> str:
    found, before = [], set[str]()
    for title, kind in SHARED.items():
        users = [f"`{name}`" for name in objectives.names() if issubclass(objectives.find(name).options, kind)]
        found.append(f"### {title}\n\n{', '.join(users[:-1])} and {users[-1]} have:\n\n{options_table(kind, before)}")
        before |= set(kind.model_fields)
    for name in objectives.names():
        options = objectives.find(name).options
        shared = shared_by(options)
        inherited = {field for title in shared for field in SHARED[title].model_fields}
        links = ", ".join(f"[{title.lower()}](#{title.lower().replace(' ', '-')})" for title in shared)
        also = f"\n\nBesides, those of {links}." if links else ""
        found.append(f"### `{name}`\n\n{options_table(options, inherited)}{also}")
    return "\n\n".join(found)


def rewards_sections() -> str:
    return "\n\n".join(f"### `{name}`\n\n{options_table(rewards.find(name).options)}" for name in rewards.names())


def environments_sections() -> str:
    names = environments.names()
    return "\n\n".join(f"### `{name}`\n\n{options_table(environments.find(name).options)}" for name in names)


@pytest.mark.parametrize("sections", [objectives_sections, rewards_sections, environments_sections])
def test_the_tables_say_what_the_code_has(sections: Any) -> None:
    doc_tables.check(PAGE, sections.__name__.partition("_")[0], sections(), __file__)


def test_every_loss_of_dpo_is_in_its_table() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \|.*arXiv", OBJECTIVES[OBJECTIVES.index("| loss |") :])
    assert rows == list(dpo.LOSSES)


def test_the_reward_of_ones_own_is_one(tmp_path: Path) -> None:
    [code] = [block for block in re.findall(r"```python\n(.*?)```", OBJECTIVES, re.S) if "REWARD" in block]
    (tmp_path / "mine.py").write_text(code)
    choice = RewardChoice.model_validate({"reward": str(tmp_path / "mine.py"), "options": {"words": 2}})
    reward, options = rewards.load(choice)
    row = {"rendered_prompt": "<|im_start|>user\nWho?", "answer": "Ada"}
    assert [reward.score(text, row, options) for text in ("It is Ada.", "Ada!", "me")] == [0.5, 1.0, 0.0]
    assert reward.needs(options) == ("answer",)
