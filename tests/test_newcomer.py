"""What a newcomer does, with the real command in a process of its own: every shipped recipe for two steps, a second
run with nothing to do, the published folder loaded as the card says, and every command of the README and docs/."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.server import own_server
from stages import reward_models
from tests.flows.raised import free_port
from tests.flows.served import serving

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SHORT = ("dpo", pytest.param("grpo", marks=pytest.mark.full))
"""Recipes that are trained beside the quickstart without their own model, one of each kind; the full suite takes all
with it. Every objective has tests of its own, and every recipe is checked against the schema."""
ROWS = 16
"""Of each source: enough for two steps."""
NOBODY = "http://127.0.0.1:9/api"
"""Where no server listens."""
TWO_STEPS = ("train.max_steps=2", "publish.gate.require=nothing")


@dataclass(frozen=True)
class Place:
    """A user's machine: a home with a store, and a working folder."""

    home: Path

    def regrow(self, *arguments: str, expect: int | None = 0, **more: str) -> "subprocess.CompletedProcess[str]":
        """Run the command as a user would, at 80 columns, `more` in the environment; it must exit with `expect`."""
        environment = {
            **{n: v for n, v in os.environ.items() if not n.startswith(("PREFECT_", "REGROW_"))},
            "XDG_DATA_HOME": str(self.home),
            "COLUMNS": "80",
            **more,
        }
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=ROOT,
            env=environment,
            input="Hello",  # what a chat is asked; nothing else reads it
            capture_output=True,
            text=True,
            timeout=560,
        )
        if expect is not None:
            assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def run(self, recipe: str) -> "subprocess.CompletedProcess[str]":
        """`regrow run` for two steps, publishing below the home."""
        return self.regrow("run", recipe, *self.settings(recipe))

    def settings(self, recipe: str) -> list[str]:
        """The overrides that make a recipe short. A teacher is what the quickstart publishes."""
        to = f"publish.to={self.home / 'out' / Path(recipe).stem}"
        whole = yaml.safe_load((ROOT / recipe).read_text())
        limits = [f"evaluate.tasks.{name}.limit=4" for name in whole.get("evaluate", {}).get("tasks", {})]
        if "group_size" in whole["train"].get("objective_options", {}):
            limits += [f"train.objective_options.{name}" for name in ("group_size=4", "prompts_per_step=2")]
        for name, source in whole["fetch"]["data"].items():
            limits.append(f"fetch.data.{name}.{'size' if 'reasoning_gym' in source else 'first'}={ROWS}")
        if "teacher" in whole["fetch"]:
            self.run("configs/quickstart.yaml")
            limits.append(f"fetch.teacher={{path: {self.home / 'out' / 'quickstart'}}}")
        allowed = ["--allow-code"] if "environment" in whole["train"].get("objective_options", {}) else []
        return [*allowed, *(word for setting in (*TWO_STEPS, *limits, to) for word in ("--set", setting))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("home"))
    yield place
    place.regrow("down")


@pytest.fixture(scope="module")
def quickstart(place: Place) -> None:
    """Run, for the tests of what can be done afterwards: each of them may be the first one of its process."""
    place.run("configs/quickstart.yaml")


def test_the_quickstart_runs_for_two_steps_and_then_has_nothing_to_do(place: Place) -> None:
    _runs_and_has_nothing_to_do(place, "configs/quickstart.yaml")


@pytest.fixture(scope="module")
def api(place: Place, prepared_home: Callable[[Path], Path]) -> Iterator[str]:
    """One server for the runs of all recipes: each would start one of its own."""
    with own_server(prepared_home(place.home / "server"), port=0) as api:
        yield api.url


@pytest.mark.parametrize("name", SHORT)
def test_a_recipe_trains_two_steps(place: Place, name: str, tiny_model: Path, api: str) -> None:
    """With a tiny model: the full suite takes the real one, and goes to the end."""
    recipe = f"configs/{name}.yaml"
    settings = place.settings(recipe)
    if "max_new_tokens" in yaml.safe_load((ROOT / recipe).read_text())["train"].get("objective_options", {}):
        settings += ["--set", "train.objective_options.max_new_tokens=8"]  # the tiny model has 256 positions
    arguments = ("+train", "--set", f"fetch.model={{path: {tiny_model}}}", *settings)
    done = place.regrow("run", recipe, *arguments, PREFECT_API_URL=api)
    assert done.stderr == "" and "✓ train" in done.stdout
    place.regrow("plan", recipe, "train", "--check", *arguments[1:])


@pytest.mark.full
@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in CONFIGS if p.stem != "quickstart"])
def test_every_recipe_runs_to_its_end(place: Place, path: Path) -> None:
    _runs_and_has_nothing_to_do(place, str(path.relative_to(ROOT)))


def _runs_and_has_nothing_to_do(place: Place, recipe: str, *arguments: str) -> None:
    arguments = (*arguments, *place.settings(recipe))
    first = place.regrow("run", recipe, *arguments)
    assert first.stderr == "", "only our own lines on the screen"
    assert max(len(line) for line in first.stdout.splitlines() if "/" not in line) <= 80
    again = place.regrow("run", recipe, *arguments, PREFECT_API_URL=NOBODY)
    assert "nothing to do" in again.stdout, "and that without Prefect, which could not be reached"
    plan = json.loads(place.regrow("plan", recipe, "--json", *arguments).stdout)
    assert {step["state"] for step in plan["steps"]} <= {"cached", "skipped"}


@pytest.mark.usefixtures("quickstart")
def test_the_published_folder_loads_as_the_card_says(place: Place) -> None:
    folder = place.home / "out" / "quickstart"
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)
    assert code
    done = subprocess.run(
        [sys.executable, "-c", code[1]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for stage in ("fetch", "convert", "tokenize", "pack", "train", "merge", "evaluate"):
        assert f"| {stage} | `" in card


@pytest.mark.usefixtures("quickstart")
def test_a_changed_key_reruns_only_what_depends_on_it(place: Place) -> None:
    settings = place.settings("configs/quickstart.yaml")
    changed = [*settings, "--set", "train.learning_rate=5e-4"]
    plan = json.loads(place.regrow("plan", "configs/quickstart.yaml", "--json", *changed).stdout)
    states = {s["stage"]: s["state"] for s in plan["steps"]}
    assert [states[s] for s in ("fetch", "convert", "tokenize", "pack", "train", "merge")] == [
        "cached",
        "cached",
        "cached",
        "cached",
        "runs",
        "unknown",
    ]
    reason = next(s["reason"] for s in plan["steps"] if s["stage"] == "train")
    assert reason == "train.learning_rate 0.001 → 0.0005"
    place.regrow("plan", "configs/quickstart.yaml", "--check", *changed, expect=3)


def test_a_failed_run_ends_with_the_command_that_goes_on(place: Place, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "wizard", "content": "x"}]}\n')
    settings = [*place.settings("configs/quickstart.yaml"), "--set", f"fetch.data.reversal={{files: {rows}}}"]
    done = place.regrow("run", "configs/quickstart.yaml", *settings, expect=2)
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: ") and "rows.jsonl" in lines[0] and "wizard" in lines[0]
    assert lines[-1].startswith("continue with: regrow run configs/quickstart.yaml")
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_the_quickstart_teaches_what_the_base_model_cannot_do(place: Place) -> None:
    to = place.home / "out" / "whole"
    done = place.regrow("run", "configs/quickstart.yaml", "--set", "name=whole", "--set", f"publish.to={to}")
    assert "passed: clearly better" in done.stdout
    scores = json.loads((to / "scores.json").read_text())
    task = scores["tasks"]["reversal"]
    assert task["n"] == 40
    assert task["base"]["high"] < 0.1 and task["tuned"]["low"] > 0.5, "the intervals are far apart"
    assert scores["heldout_loss"]["better"] == "tuned"
    assert scores["scored_twice"] == scores["agreeing"] == 80


def commands() -> list[str]:
    """Every command line of the README and docs/ that starts with `regrow`."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(), re.S):
            lines = (line.removeprefix("$ ").partition("  #")[0].strip() for line in block.splitlines())
            found += [line for line in lines if line.startswith("regrow ")]
    return list(dict.fromkeys(found))


def once(commands: list[str]) -> Iterator[Any]:
    """Of those that load a model anew, one after every change."""
    loading = [command for command in commands if command.startswith(("regrow chat", "regrow serve"))]
    for command in commands:
        yield pytest.param(command, marks=[pytest.mark.full] if command in loading[1:] else [])


@pytest.mark.usefixtures("quickstart")
@pytest.mark.parametrize("command", once(commands()))
def test_every_documented_command_runs(place: Place, command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0] in ("run", "plan", "inspect"):
        words += place.settings(words[1])
    if words[0] == "up":
        words += ["--port", str(free_port())]
    if words[0] == "chat":
        words += ["--max-new-tokens", "4"]
    if words[0] == "serve":
        with serving(words, place.home) as port:
            assert port
        return
    done = place.regrow(*words, expect=None)
    # 3 is `plan --check` saying that something would run: an answer, not a mistake.
    answers = done.returncode in (0, 3)
    # So is that there is nothing to promote or to go back to, after this one run.
    answers |= words[0] in ("promote", "rollback") and done.stderr.startswith("error: quickstart")
    assert answers, f"{command}\n{done.stdout}\n{done.stderr}"


def test_every_make_target_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    pages = (ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md")))
    named = {t for page in pages for t in re.findall(r"`make ([a-z-]+)`", page.read_text())}
    assert named <= targets


def test_the_readme_names_every_extra_that_all_leaves_out() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [bracket] = re.findall(r"\[(.*)\]", extras["all"][0])
    left_out = set(extras) - {"all", "dev", *bracket.split(",")}
    readme = (ROOT / "README.md").read_text()
    assert [name for name in sorted(left_out) if f"`{name}`" not in readme] == []


@pytest.mark.full
def test_a_reward_model_is_trained_published_and_judges_answers(place: Place, tiny_model: Path, tmp_path: Path) -> None:
    """With a tiny model, by two runs of the command."""
    judge = tmp_path / "judge"
    settings = (*place.settings("configs/reward.yaml"), "--set", f"publish.to={judge}", "--set", "name=terse")
    place.regrow("run", "configs/reward.yaml", "--set", f"fetch.model={{path: {tiny_model}}}", *settings)
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": str(n)}]}
        for n in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "judged",
        "fetch": {
            "model": {"path": str(tiny_model)},
            "reward_models": {"terse": {"path": str(judge)}},
            "data": {"rows": {"files": str(tmp_path / "rows.jsonl")}},
        },
        "pack": {"sequence_length": 128},
        "train": {"max_steps": 2},
        "evaluate": {"tasks": {"worth": {"source": "rows", "reward_model": "terse", "limit": 8, "max_new_tokens": 4}}},
        "publish": {"to": str(tmp_path / "out"), "gate": {"require": "nothing"}},
    }
    (tmp_path / "judged.yaml").write_text(yaml.safe_dump(recipe))
    told = place.regrow("run", str(tmp_path / "judged.yaml"))
    assert told.stderr == "" and re.search(r"worth, reward of 8 +-?\d+\.\d\d \[", told.stdout), told.stdout
    assert "nothing to do" in place.regrow("run", str(tmp_path / "judged.yaml"), PREFECT_API_URL=NOBODY).stdout
    place.regrow("plan", str(tmp_path / "judged.yaml"), "--check")


@pytest.mark.full
def test_a_process_reward_model_is_trained_published_and_rewards_and_judges(
    place: Place, tiny_model: Path, tmp_path: Path
) -> None:
    """With a tiny model, by two runs of the command: the second trains on what it gives, and is judged by it."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    judge = tmp_path / "judge"
    settings = (*place.settings("configs/process_reward.yaml"), "--set", f"publish.to={judge}", "--set", "name=judge")
    place.regrow("run", "configs/process_reward.yaml", "--set", f"fetch.model={{path: {tiny_model}}}", *settings)
    assert json.loads((judge / "config.json").read_text())["step_separator"] == "\n"
    assert "model.config.step_separator" in (judge / "README.md").read_text()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Add {n}."}) + "\n" for n in range(24)))
    reward = {"reward": "reward_model", "options": {"model": "steps", "steps": "product"}}
    sampled = {"group_size": 2, "prompts_per_step": 2, "max_new_tokens": 8, "reward_seconds": 60}
    asked = {"source": "rows", "question": "prompt", "reward_model": "steps", "limit": 8, "max_new_tokens": 8}
    recipe = {
        "name": "rewarded",
        "fetch": {
            "model": {"path": str(tiny_model)},
            "reward_models": {"steps": {"path": str(judge)}},
            "data": {"rows": {"files": str(tmp_path / "rows.jsonl")}},
        },
        "convert": {"format": "prompt_only"},
        "pack": {"sequence_length": 128},
        "train": {
            "objective": "grpo",
            "objective_options": {"rewards": {"sound": reward}, **sampled},
            "max_steps": 2,
        },
        "evaluate": {"tasks": {"sound": asked}},
        "publish": {"to": str(tmp_path / "out"), "gate": {"require": "nothing"}},
    }
    (tmp_path / "rewarded.yaml").write_text(yaml.safe_dump(recipe))
    told = place.regrow("run", str(tmp_path / "rewarded.yaml"))
    assert re.search(r"sound % of 8 +\d+\.\d \[", told.stdout), told.stdout
    written = [json.loads(line) for line in place.regrow("rollouts", "rewarded", "--json").stdout.splitlines()]
    network = AutoModelForTokenClassification.from_pretrained(judge)
    model = reward_models.of(judge, network.eval(), AutoTokenizer.from_pretrained(judge), "product")
    assert len(written) == 2 * 2 * 2
    for one in written:
        assert one["rewards"]["sound"] == pytest.approx(model.worth_after(one["prompt"], one["completion"]), rel=0.02)
    assert "nothing to do" in place.regrow("run", str(tmp_path / "rewarded.yaml"), PREFECT_API_URL=NOBODY).stdout
