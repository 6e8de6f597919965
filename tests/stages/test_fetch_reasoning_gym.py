"""fetch: rows that the library reasoning-gym makes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.identity import tree_of
from stages.rows import read_rows
from tests.stages.fetching import REASONING, bring, home, shards

__all__ = ["home"]


class TestReasoningGym:
    def test_rows_are_chats_with_what_scoring_needs(self, tmp_path: Path) -> None:
        [part] = shards({**REASONING, "options": {"min_word_len": 4}})
        assert part.config["found"]["options"] == {"min_word_len": 4} and part.where == {}
        output = bring(part, tmp_path / "out")
        rows = [row for _, row in read_rows(output / "00000" / "rows.jsonl", "rows")]
        assert len(rows) == 40
        for row in rows:
            assert isinstance(row, dict)
            assert [(m["role"], m["content"]) for m in row["messages"]] == [
                ("user", row["question"]),
                ("assistant", row["answer"]),
            ]
            assert row["answer"] == row["metadata"]["word"][::-1] and row["task"] == "spell_backward"
        questions = [row["question"] for row in rows if isinstance(row, dict)]
        assert len(set(questions)) == 40

    def test_the_same_seed_gives_the_same_bytes_and_the_next_seed_other_rows(self, tmp_path: Path) -> None:
        def questions(seed: int, name: str) -> tuple[str, set[str]]:
            [part] = shards({**REASONING, "size": 200, "seed": seed})
            output = bring(part, tmp_path / name)
            rows = [json.loads(line) for line in (output / "00000" / "rows.jsonl").read_text().splitlines()]
            return tree_of(output).digest, {row["question"] for row in rows}

        one, again, two = questions(1, "a"), questions(1, "b"), questions(2, "c")
        assert one == again
        # The library's seeds 1 and 2 share 199 of 200 items.
        assert len(one[1] & two[1]) < 10

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (
                {"reasoning_gym": "spel_backward", "size": 3},
                "there is no task 'spel_backward'. Did you mean spell_backward",
            ),
            ({"reasoning_gym": "zzz", "size": 3}, "there is no task 'zzz'. There are .*spell_backward"),
        ],
    )
    def test_an_unknown_task_is_told_before_anything_runs(self, data: Any, says: str) -> None:
        with pytest.raises(UserError, match=f"fetch.data.mine.reasoning_gym: {says}"):
            shards(data)

    @pytest.mark.parametrize(
        ("options", "size", "says"),
        [
            ({"min_len": 3}, 3, "has no option 'min_len': expected .*min_word_len"),
            ({"min_word_len": -1}, 3, "refuses its options: min_word_len must be positive"),
            ({"min_word_len": "x"}, 3, "refuses its options"),
            ({"min_word_len": 3, "max_word_len": 3}, 3000, "gave only .* different questions"),
        ],
    )
    def test_options_that_do_not_fit_are_told(self, tmp_path: Path, options: Any, size: int, says: str) -> None:
        [part] = shards({"reasoning_gym": "spell_backward", "size": size, "options": options})
        with pytest.raises(UserError, match=says):
            bring(part, tmp_path / "out")

    def test_every_task_is_known_without_importing_the_library(self) -> None:
        import reasoning_gym

        from stages.sources.reasoning import _tasks

        # `composite` is made of other tasks' objects, which no recipe can hold.
        assert _tasks() == set(reasoning_gym.factory.DATASETS) - {"composite"}

    @pytest.mark.full
    def test_every_task_gives_the_same_bytes_in_any_process(self, tmp_path: Path) -> None:
        # With one hash seed, which a stage's child process has: five tasks depend on the order of sets.
        script = (
            "import sys\nfrom pathlib import Path\n"
            "from stages.sources import reasoning\nfrom stages.sources.pieces import Pieces\n"
            "from stages.stage import Work\n"
            "for task in sorted(reasoning._tasks()):\n"
            "    out = Path(sys.argv[1]) / task\n    out.mkdir(parents=True)\n"
            "    found = {'task': task, 'options': {}, 'size': 3, 'seed': 7}\n"
            "    try:\n        reasoning.bring(found, {}, Pieces(out, {}, task), Work(out))\n"
            "    except ValueError as error:\n        (out / 'refused').write_text(str(error))\n"
        )
        root = Path(__file__).parents[2]
        found = []
        for run in ("1", "2"):
            environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "0"}
            subprocess.run([sys.executable, "-c", script, str(tmp_path / run)], check=True, env=environment)
            found.append({f.path: f.sha256 for f in tree_of(tmp_path / run).files})
        differing = {path.partition("/")[0] for path in found[0] if found[0][path] != found[1].get(path)}
        assert differing == set()
        refused = sorted(path.parent.name for path in (tmp_path / "1").glob("*/refused"))
        assert refused == []
