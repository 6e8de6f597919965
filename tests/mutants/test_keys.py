"""What keys and checkpoints tell apart, where a changed line went unnoticed by all other tests."""

import os
from pathlib import Path

import pytest
import torch

from stages import evals, evaluate, reward_models
from stages.errors import UserError
from stages.identity import tree_of
from stages.objectives import reward
from stages.stage import Part, part_action
from stages.train import TrainConfig, state
from stages.train.data import refuse_unknown_tokens
from stages.views import intact
from tests.objectives.test_reward_models import batch_of, headed, inputs  # noqa: F401


def test_the_versions_of_what_scores_are_in_the_key_of_each_part() -> None:
    measure = evaluate.Measure(task=evaluate.Task(source="a"))
    made = part_action(evaluate.STAGE, Part("base/a", measure.model_dump(mode="json")))
    assert made.version == {"evaluate": evaluate.STAGE.version, "eval:exact_match": evals.load("exact_match").version}
    judged = evaluate.Measure(task=evaluate.Task(source="a", reward_model="m"))
    made = part_action(evaluate.STAGE, Part("base/a", judged.model_dump(mode="json")))
    assert made.version == {"evaluate": evaluate.STAGE.version, "reward_models": reward_models.VERSION}


def test_the_first_token_without_an_embedding_is_refused() -> None:
    refuse_unknown_tokens([{"path": "chat/00000", "highest_token": 63}], 64)
    with pytest.raises(UserError, match="chat/00000: the tokenizer gives token 64, but the model embeds only 64"):
        refuse_unknown_tokens([{"path": "chat/00000", "highest_token": 64}], 64)


@pytest.mark.parametrize("other", ["plan/plan.json", "plan/bins.arrow", "model/config.json"])
def test_a_checkpoint_belongs_to_one_plan_and_one_model(tmp_path: Path, other: str) -> None:
    for name in ("plan/plan.json", "plan/bins.arrow", "model/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    folders = {"plan": tmp_path / "plan", "model": tmp_path / "model"}
    before = state.identity(TrainConfig(), folders)
    assert state.identity(TrainConfig(), folders) == before
    (tmp_path / other).write_text('{"x": 1}')
    assert state.identity(TrainConfig(), folders) != before


@pytest.mark.parametrize("inputs", ["reward"], indirect=True)
def test_margins_are_held_only_where_they_are_asked_for(inputs: dict[str, Path]) -> None:  # noqa: F811
    _, batch = batch_of(inputs, "reward")
    model, _ = headed(inputs, 1)
    assert batch["margin"].any()
    with torch.no_grad():
        with_margins, without = (
            reward.loss(model, reward.RewardOptions(margins=each), batch)(batch) for each in (True, False)
        )
        none = reward.loss(model, reward.RewardOptions(), batch)({**batch, "margin": torch.zeros_like(batch["margin"])})
    assert without["loss"].item() == pytest.approx(none["loss"].item())
    assert without["loss"].item() < with_margins["loss"].item()


def test_what_was_hashed_while_it_was_fresh_is_hashed_again(tmp_path: Path) -> None:
    """Its time may be too coarse to tell a change right after the look."""
    path = tmp_path / "blob"
    path.write_bytes(b"one")
    [file] = tree_of(tmp_path).files
    assert intact(tmp_path.parent / "cache", path, file)
    found = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert not intact(tmp_path.parent / "cache", path, file)
