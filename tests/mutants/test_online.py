"""Training on a model's own completions, where a changed line went unnoticed by all other tests."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from stages.objectives import find, options_of
from stages.objectives.ebft import EbftOptions
from stages.objectives.grpo import SampledOptions
from stages.runtime import Runtime
from stages.stage import Work
from stages.tables import read_table
from stages.train import TrainConfig, online, online_trainer, teacher
from stages.train.features import Matching, matching
from stages.train.rollouts import Recorder
from tests.stages.packed import Packed
from tests.stages.test_train_online import prompts, train

LENGTH = {"reward": "length", "options": {"most": 8}}
TWO = {"rewards": {"one": {**LENGTH, "weight": 0.3}, "two": {**LENGTH, "weight": -2.0}}}
SAMPLED = {"max_new_tokens": 17, "temperature": 0.7, "top_p": 0.9}
REWARDED = {**TWO, "group_size": 5, "iterations": 3, "epsilon": 0.1, "epsilon_high": 0.28, "mask_truncated": True}
GROUPS = {"beta": 0.04, "loss": "luspo", "importance": "sequence"}

AS_TRL_CALLS_IT = {
    "max_new_tokens": "max_completion_length",
    "group_size": "num_generations",
    "iterations": "num_iterations",
    "mask_truncated": "mask_truncated_completions",
    "loss": "loss_type",
    "importance": "importance_sampling_level",
}


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("grpo", {**SAMPLED, **REWARDED, **GROUPS, "scale_rewards": "batch"}),
        ("gdpo", {**SAMPLED, **REWARDED, **GROUPS}),
        ("rloo", {**SAMPLED, **REWARDED, "beta": 0.04, "normalize_advantages": True}),
        ("ebft", {**SAMPLED, "group_size": 5}),
        ("on_policy_distillation", {**SAMPLED, "beta": 0.04}),
    ],
)
def test_every_option_of_an_online_objective_reaches_the_trainer(objective: str, options: dict[str, Any]) -> None:
    """One that does not is set in the recipe, changes the key, and trains by TRL's default."""
    online = find(objective).online
    assert online is not None
    found = online.settings(options_of(objective, options))
    asked = {AS_TRL_CALLS_IT.get(name, name): value for name, value in options.items() if name != "rewards"}
    assert {name: found[name] for name in asked} == asked
    assert found.get("reward_weights") == ([0.3, -2.0] if "rewards" in options else None)
    of_its_own = {"gdpo": {"multi_objective_aggregation": "normalize_then_sum"}, "ebft": {"beta": 0.0}}
    assert found.items() >= of_its_own.get(objective, {}).items()


def test_an_episode_ends_after_as_many_turns_as_are_asked_for() -> None:
    online = find("grpo").online
    assert online is not None
    acting = options_of(
        "grpo", {"environment": {"name": "openenv", "turns": 3, "options": {"url": "http://127.0.0.1"}}}
    )
    assert online.settings(acting)["max_tool_calling_iterations"] == 3


def arguments(folder: Path, config: dict[str, Any], options: dict[str, Any], micro_batch: int) -> dict[str, Any]:
    made = TrainConfig.model_validate({"objective": "grpo", "objective_options": options, **config})
    online, parsed = find("grpo").online, options_of("grpo", options)
    assert online is not None and isinstance(parsed, SampledOptions)
    work = Work(folder, Runtime(device="cpu", micro_batch=micro_batch))
    return online_trainer.arguments(made, parsed, online, 10, "cpu", (), work)


@pytest.mark.parametrize(("asked", "at_once"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (6, 6), (99, 6)])
def test_a_step_takes_as_many_prompts_as_are_asked_for_whatever_goes_in_at_once(
    tmp_path: Path, asked: int, at_once: int
) -> None:
    found = arguments(tmp_path, {}, {**TWO, "group_size": 5, "prompts_per_step": 6}, asked)
    assert found["per_device_train_batch_size"] == at_once * 5
    assert found["gradient_accumulation_steps"] * at_once == 6


@pytest.mark.parametrize(
    ("given", "steps", "asked"),
    [
        ({"epochs": 2}, 2 * 2 * 3, 2 * 2 * 2),
        ({"epochs": 1.5}, 3 * 3, 3 * 2),
        ({"max_steps": 7}, 7, 3 * 2),
    ],
)
def test_an_epoch_asks_every_prompt_and_trains_each_batch_as_often_as_is_asked_for(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], steps: int, asked: int
) -> None:
    """Three prompts, two in a step, are two steps; iterations on their completions come besides."""
    prompts(tmp_path / "tokens", tiny_model, ["say one\n", "say two\n", "say six\n"])
    plan = Packed(tmp_path / "tokens", tmp_path / "plan").output
    told: list[tuple[int, ...]] = []
    order = online.prompts.order

    class Enough(Exception):
        pass

    def drawn(rows: int, total: int, seed: int) -> list[int]:
        told.append((rows, total, seed))
        return order(rows, total, seed)

    def made(config: Any, options: Any, online: Any, total: int, *others: Any) -> Any:
        told.append((total,))
        raise Enough

    monkeypatch.setattr(online.prompts, "order", drawn)
    monkeypatch.setattr(online_trainer, "arguments", made)
    options = {"rewards": {"short": LENGTH}, "prompts_per_step": 2, "iterations": 3, "max_new_tokens": 8}
    config = {"objective": "grpo", "objective_options": options, "precision": "fp32", "seed": 5, **given}
    inputs = {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": plan}
    with pytest.raises(Enough):
        train(tmp_path, inputs, config)
    assert told == [(3, asked, 5), (steps,)]


def test_the_recipe_says_how_the_trainer_draws_and_clips(tmp_path: Path) -> None:
    """TRL shuffles by itself otherwise, and clips at 1."""
    config = {"seed": 7, "max_gradient_norm": 0.25, "learning_rate": 3e-4, "precision": "fp32"}
    found = arguments(tmp_path, config, TWO, 1)
    wanted = {"seed": 7, "max_grad_norm": 0.25, "learning_rate": 3e-4, "shuffle_dataset": False, "max_steps": 10}
    assert found.items() >= {**wanted, "bf16": False, "fp16": False}.items()


def test_a_checkpoint_is_asked_for_only_where_a_batch_of_completions_is_done() -> None:
    """The completions are in no checkpoint: a run that goes on within a batch would train it on others."""
    stop = threading.Event()
    saving = online_trainer.Saving(0.0, 3, stop)

    def asked(step: int) -> tuple[bool, bool]:
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        saving.on_step_end(None, SimpleNamespace(global_step=step, max_steps=9), control)
        return control.should_save, control.should_training_stop

    assert [asked(step)[0] for step in range(1, 10)] == [step in (3, 6) for step in range(1, 10)], "the last is written"
    stop.set()
    assert [asked(step) for step in (4, 6)] == [(False, False), (True, True)]


def test_continuations_are_matched_with_the_reference_of_their_own_prompt(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    options = EbftOptions(group_size=2, diversity=0.5, whiten=False)
    read: list[list[list[int]]] = []
    kept: list[Any] = []
    end, texts_asked, rest = 1, ["ab", "ab", "xyz", "xyz"], [[10, 11], [10, 11], [12], [12]]
    written = [[20, 21], [22, end], [23, 24], [24, 23]]

    def features(texts: list[list[int]]) -> Tensor:
        read.append(texts)
        return torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(sum(text))) for text in texts])

    frozen: Any = SimpleNamespace(features=features)
    match = Matching(frozen, tokenizer, options, lambda *given: kept.append(given))
    told: dict[str, float] = {}
    found = match(texts_asked, ["a", "b", "c", "d"], written, rest, told.__setitem__)
    ab, xyz = tokenizer(["ab", "xyz"])["input_ids"]
    texts = [[*ab, 20, 21], [*ab, 22], [*xyz, 23, 24], [*xyz, 24, 23], [*ab, 10, 11], [*xyz, 12]]
    assert read == [texts]
    of = features(texts)
    assert found == pytest.approx(matching(of[:4].view(2, 2, 6), of[4:], 0.5, False).flatten().tolist())
    assert kept == [(texts_asked, ["a", "b", "c", "d"], found)] and told["feature_loss"] > 0


def test_who_writes_a_steps_completions_is_drawn_by_the_seed_and_the_step() -> None:
    """A run that goes on must draw what it would have drawn, and another seed something else."""

    class Trl:
        def __init__(self) -> None:
            self.model_wrapped, self.teacher_model = "student", "teacher"
            self.state = SimpleNamespace(global_step=0)
            self.processing_class = SimpleNamespace(batch_decode=lambda ids, **_: [str(each) for each in ids])
            self.wrote: list[str] = []

        def _generate_single_turn(self, prompt_ids: list[list[int]]) -> list[list[int]]:
            self.wrote.append(self.model_wrapped)
            return [[9] for _ in prompt_ids]

    def writers(share: float, seed: int, steps: range = range(40)) -> list[str]:
        kept: list[tuple[Any, ...]] = []
        trainer = teacher.sampling(Trl, share, seed, lambda *given: kept.append(given))()
        for step in steps:
            trainer.state.global_step = step
            assert trainer._generate_single_turn([[1], [2]]) == [[9], [9]] and trainer.model_wrapped == "student"
        assert kept == [(step, ["[1]", "[2]"], ["[9]", "[9]"]) for step in steps]
        wrote: list[str] = trainer.wrote
        return wrote

    assert writers(1.0, 1) == ["student"] * 40 and writers(0.0, 1) == ["teacher"] * 40
    one = writers(0.7, 1)
    assert one[25:] == writers(0.7, 1, range(25, 40)) and one != writers(0.7, 2)
    assert 20 < one.count("student") < 36 and len(set(one)) == 2


def test_what_was_written_after_the_checkpoint_is_kept_once(tmp_path: Path) -> None:
    """A run that was killed wrote on after its last checkpoint, and writes these steps again."""
    killed = Recorder(None, tmp_path / "rollouts")
    for step in range(3):
        killed.keep(step, ["p"] * 2, [f"{step} a", f"{step} b"])
        if step == 1:
            (tmp_path / "2").mkdir()
            killed.save(tmp_path / "2")
    again = Recorder(None, tmp_path / "rollouts")
    assert again.go_on(tmp_path / "2") == 4
    again.keep(2, ["p"], ["2 a"])
    again.keep(2, ["p"], ["2 b"])  # a batch in two parts
    assert again.write(tmp_path / "rollouts.arrow") == 6
    rows = read_table(tmp_path / "rollouts.arrow").to_pylist()
    assert [(row["step"], row["completion"]) for row in rows] == [(s + 1, f"{s} {x}") for s in range(3) for x in "ab"]
    assert Recorder(None, tmp_path / "rollouts").go_on(None) == 0
    assert not list((tmp_path / "rollouts").iterdir())


def test_an_environments_reward_counts_by_its_own_weight(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts(tmp_path / "tokens", tiny_model, ["say one\n"])
    plan = Packed(tmp_path / "tokens", tmp_path / "plan").output
    told: list[Any] = []

    class Enough(Exception):
        pass

    def made(online: Any, arguments: dict[str, Any]) -> Any:
        told.append(arguments["reward_weights"])
        raise Enough

    monkeypatch.setattr(online.feedback, "episodes_of", lambda *given: SimpleNamespace(weights=[0.25]))
    monkeypatch.setattr(online_trainer, "settings_of", made)
    options = {**TWO, "prompts_per_step": 1, "max_new_tokens": 8}
    config = {"objective": "grpo", "objective_options": options, "precision": "fp32", "max_steps": 1}
    with pytest.raises(Enough):
        train(tmp_path, {"model": tiny_model, "tokens": tmp_path / "tokens", "plan": plan}, config)
    assert told == [[0.3, -2.0, 0.25]]
