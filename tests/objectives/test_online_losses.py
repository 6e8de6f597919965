"""Online objectives against their papers: rewards added up, advantages, and loss and gradient of two steps on the same
completions, the second of which is where probability ratios have left one and are clipped."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from stages.tables import read_table
from stages.train.online_trainer import Saving
from tests.objectives.test_on_policy_distillation import unpadded
from tests.stages.packed import Packed
from tests.stages.test_train_online import figures, prompts, recipe, train

GROUP, MOST, EPSILON, TEMPERATURE = 4, 12, 0.2, 0.7
RATIO = 1.02
"""What cispo's ratios are cut at: near one, for two steps move them little."""
WEIGHTS = {"letters": 1.0, "short": -0.3}

LogProbs = list[Tensor]
"""[completions][tokens] What a model gives each token of each completion."""


def by_group(rewards: Tensor) -> Tensor:
    """GRPO: a completion's reward against its group's mean, in its group's standard deviations."""
    grouped = (rewards @ torch.tensor([*WEIGHTS.values()])).view(-1, GROUP)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def against_group(rewards: Tensor) -> Tensor:
    """Dr. GRPO: the same, and divided by nothing."""
    grouped = (rewards @ torch.tensor([*WEIGHTS.values()])).view(-1, GROUP)
    return (grouped - grouped.mean(1, keepdim=True)).flatten()


def one_by_one(rewards: Tensor) -> Tensor:
    """GDPO: each reward is normalized in its group by itself, their weighted sum in the batch."""
    grouped = rewards.view(-1, GROUP, len(WEIGHTS))
    each = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    added = each.view(-1, len(WEIGHTS)) @ torch.tensor([*WEIGHTS.values()])
    return (added - added.mean()) / (added.std() + 1e-4)


def leaving_one_out(rewards: Tensor) -> Tensor:
    """RLOO: against the mean of the others."""
    grouped = (rewards @ torch.tensor([*WEIGHTS.values()])).view(-1, GROUP)
    return torch.stack([one - (group.sum() - one) / (GROUP - 1) for group in grouped for one in group])


def clipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)


def tokens(now: LogProbs, before: LogProbs, advantages: Tensor) -> LogProbs:
    return [clipped((n - b).exp(), a) for n, b, a in zip(now, before, advantages, strict=True)]


def dapo(now: LogProbs, before: LogProbs, advantages: Tensor) -> Tensor:
    """The mean over all tokens of the step."""
    return torch.cat(tokens(now, before, advantages)).mean()


def dr_grpo(now: LogProbs, before: LogProbs, advantages: Tensor) -> Tensor:
    """The sum over the tokens, by what is the same for all: how many there could be."""
    return torch.cat(tokens(now, before, advantages)).sum() / (len(now) * MOST)


def gspo(now: LogProbs, before: LogProbs, advantages: Tensor) -> Tensor:
    """A completion has one ratio: the geometric mean of its tokens'."""
    ratios = torch.stack([(n - b).mean().exp() for n, b in zip(now, before, strict=True)])
    return clipped(ratios, advantages).mean()


def grpo(now: LogProbs, before: LogProbs, advantages: Tensor) -> Tensor:
    """arXiv:2402.03300: the mean over completions of the means over their tokens."""
    return torch.stack([each.mean() for each in tokens(now, before, advantages)]).mean()


def luspo(now: LogProbs, before: LogProbs, advantages: Tensor) -> Tensor:
    """arXiv:2602.05261: GSPO, a completion weighed by its length."""
    ratios = torch.stack([(n - b).mean().exp() for n, b in zip(now, before, strict=True)])
    return (torch.tensor([len(n) for n in now]) * clipped(ratios, advantages)).mean()


def cispo(now: LogProbs, before: LogProbs, advantages: Tensor) -> Tensor:
    """arXiv:2506.13585, equation 4: REINFORCE, each token weighed by its ratio, which is cut and has no gradient."""
    ratios = [(n - b).exp().clamp(max=RATIO).detach() for n, b in zip(now, before, strict=True)]
    return torch.cat([-r * a * n for r, a, n in zip(ratios, advantages, now, strict=True)]).mean()


def sapo(now: LogProbs, before: LogProbs, advantages: Tensor) -> Tensor:
    """arXiv:2511.20347, equations 5 and 6: a smooth gate in place of the cut, steeper where the advantage is negative;
    the mean over completions of the means over their tokens."""
    losses = []
    for n, b, a in zip(now, before, advantages, strict=True):
        steep = 1.0 if a > 0 else 1.05
        losses.append(-(4 / steep * torch.sigmoid(steep * ((n - b).exp() - 1)) * a).mean())
    return torch.stack(losses).mean()


def vespo(now: LogProbs, before: LogProbs, advantages: Tensor) -> Tensor:
    """arXiv:2602.10693: REINFORCE, each completion weighed by w^k e^(c(1 - w)) of its ratio w, which has no gradient;
    k is 2 and c 3, with a negative advantage k is 3 and c 2. The mean over all tokens."""
    losses = []
    for n, b, a in zip(now, before, advantages, strict=True):
        ratio, (k, c) = (n - b).sum().exp().detach(), (2, 3) if a >= 0 else (3, 2)
        losses.append(-(ratio**k) * torch.exp(c * (1 - ratio)) * a * n)
    return torch.cat(losses).mean()


def rloo(now: LogProbs, before: LogProbs, advantages: Tensor) -> Tensor:
    """A completion is one action, so its ratio is the product of its tokens'."""
    ratios = torch.stack([(n - b).sum().exp() for n, b in zip(now, before, strict=True)])
    return clipped(ratios, advantages).mean()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A model that often ends what it writes, so that completions are of unlike lengths."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("ending") / "model"))
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        network.lm_head.weight[network.config.eos_token_id] *= 30
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What is generated while a test runs: the mask of what was asked, and what came."""
    seen: list[tuple[Tensor, Tensor]] = []
    generate = LlamaForCausalLM.generate

    def listening(self: Any, **given: Any) -> Any:
        came = generate(self, **given)
        seen.append((given["attention_mask"], came))
        return came

    monkeypatch.setattr(LlamaForCausalLM, "generate", listening)
    return seen


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights after every step while a test runs. There is no checkpoint within a batch's iterations."""
    seen: list[dict[str, Tensor]] = []
    end = Saving.on_step_end

    def listening(self: Any, args: Any, state: Any, control: Any, **given: Any) -> Any:
        seen.append({name: weight.clone() for name, weight in given["model"].state_dict().items()})
        return end(self, args, state, control, **given)

    monkeypatch.setattr(Saving, "on_step_end", listening)
    return seen


def log_probs(model: Any, sequences: list[tuple[int, list[int]]]) -> LogProbs:
    """Sequence by sequence, unpadded."""
    found = []
    for asked, ids in sequences:
        logits = model(torch.tensor([ids])).logits[0, asked - 1 : -1].double() / TEMPERATURE
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[asked:])[:, None])[:, 0])
    return found


@pytest.mark.parametrize(
    ("objective", "options", "advantages_of", "loss_of"),
    [
        ("grpo", {}, by_group, dapo),
        ("gdpo", {}, one_by_one, dapo),
        ("rloo", {"beta": 0.0}, leaving_one_out, rloo),
        pytest.param(
            "grpo", {"loss": "dr_grpo", "scale_rewards": "none"}, against_group, dr_grpo, marks=pytest.mark.full
        ),
        ("grpo", {"loss": "grpo", "importance": "sequence"}, by_group, gspo),
        ("grpo", {"loss": "grpo"}, by_group, grpo),
        pytest.param("grpo", {"loss": "luspo", "importance": "sequence"}, by_group, luspo, marks=pytest.mark.full),
        pytest.param("grpo", {"loss": "cispo", "epsilon_high": RATIO}, by_group, cispo, marks=pytest.mark.full),
        pytest.param("grpo", {"loss": "sapo"}, by_group, sapo, marks=pytest.mark.full),
        pytest.param("grpo", {"loss": "vespo"}, by_group, vespo, marks=pytest.mark.full),
    ],
    ids=["dapo", "gdpo", "rloo", "dr_grpo", "gspo", "grpo", "luspo", "cispo", "sapo", "vespo"],
)
def test_rewards_loss_and_gradient_are_the_papers(
    tmp_path: Path,
    model: Path,
    written: list[tuple[Tensor, Tensor]],
    moved: list[dict[str, Tensor]],
    objective: str,
    options: dict[str, Any],
    advantages_of: Callable[[Tensor], Tensor],
    loss_of: Callable[[LogProbs, LogProbs, Tensor], Tensor],
) -> None:
    prompts(tmp_path / "tokens", model, ["say one\n", "say twenty\n"])
    plan = Packed(tmp_path / "tokens", tmp_path / "plan").output
    config = recipe(tmp_path, objective, steps=2, group_size=GROUP, iterations=2, temperature=TEMPERATURE, **options)
    judged = config["objective_options"]["rewards"]
    judged["short"] = {"reward": "length", "weight": WEIGHTS["short"], "options": {"most": 4}}
    inputs = {"model": model, "tokens": tmp_path / "tokens", "plan": plan}
    # Whole completions' ratios leave one quickly, and what vespo makes of one far from it is zero.
    rate = 3e-4 if options.get("loss") == "vespo" else config["learning_rate"]
    settings = {**config, "warmup": 0, "learning_rate": rate}
    output, _ = train(tmp_path, inputs, settings, allow_code=True, micro_batch=1)

    ((mask, came),) = written
    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = unpadded(mask, came, tokenizer.eos_token_id)
    assert len({len(ids) - asked for asked, ids in sequences}) > 2
    rollouts = read_table(output / "rollouts.arrow").to_pylist()
    texts = [tokenizer.decode(ids[asked:], skip_special_tokens=True) for asked, ids in sequences]
    assert [row["completion"] for row in rollouts] == texts and len(texts) == 2 * GROUP
    rewards = torch.tensor([[dict(row["rewards"])[name] for name in WEIGHTS] for row in rollouts], dtype=torch.float64)
    assert (rewards.view(2, GROUP, 2).std(1) > 0).any(0).all(), "rewards that are all the same would show nothing"

    first, second = figures(output)
    assert first["reward"] == pytest.approx((rewards @ torch.tensor([*WEIGHTS.values()]).double()).mean().item())
    if options.get("loss") not in ("cispo", "sapo", "vespo"):  # which cut nothing, or cut the ratio itself
        assert second["clip_fraction"] > first["clip_fraction"] == 0.0
    advantages = advantages_of(rewards.float()).double()
    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        before = log_probs(network, sequences)
    for weights, step in ((network.state_dict(), first), (moved[0], second)):
        network.load_state_dict(weights)
        network.zero_grad()
        loss = loss_of(log_probs(network, sequences), before, advantages)
        loss.backward()
        norm = torch.cat([weight.grad.flatten() for weight in network.parameters()]).norm()
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
