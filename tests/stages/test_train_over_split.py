"""Optimizers over split weights do what they do over float32 ones, to the bit: they themselves are the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.train import TrainConfig, adamw, optimizers, over_split, state
from stages.train.over_split import OverSplit
from tests.stages import tiny
from tests.stages.test_train_optimizers import ON_GPU, section

NAMES = [
    name
    for name, kind in optimizers.OPTIMIZERS.items()
    if not kind.counts_for_all and kind.where != optimizers.SPLIT.where and name != "adamw_torch_fused"
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, initializer_range=0.1)


def made(
    folder: Path, config: TrainConfig, split: bool, device: str, wide: tuple[str, ...] = ("norm",)
) -> tuple[Any, torch.optim.Optimizer]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    if split:
        adamw.split(model, wide)  # as models that keep some weights in float32
    return model, optimizers.make(model, config)


def steps(model: Any, optimizer: Any, numbers: range, longest: float | None = None) -> None:
    """Steps on gradients that bfloat16 holds, the same for every model."""
    for number in numbers:
        drawn = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=drawn).bfloat16()
            parameter.grad = gradient.to(parameter.device, parameter.dtype)
        if longest is not None and isinstance(optimizer, OverSplit):
            optimizer.clip(longest)
        elif longest is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), longest)
        optimizer.step()


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: adamw.whole(p).clone() for name, p in model.named_parameters()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> None:
    for key, value in expected.items():
        assert torch.equal(found[key], value), f"{name}: {key}"


def write(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    folder.mkdir()
    torch.save(state.state_of(optimizer, keep=True), folder / state.OPTIMIZER)


def check(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, device: str) -> None:
    pytest.importorskip(optimizers.find(name).where.partition(":")[0].partition(".")[0])
    monkeypatch.setattr(over_split, "PORTION", 5000)  # several weights at once, and some by themselves
    config = section(name, weight_decay=0.1, learning_rate=1e-3)
    ends, middles = {}, {}
    for split in (False, True):  # one after the other: bitsandbytes remembers one model's embeddings
        model, optimizer = made(folder, config, split, device)
        assert isinstance(optimizer, OverSplit) == split
        steps(model, optimizer, range(5))
        if split:  # nothing keeps a weight whole
            assert not [
                n for p in model.parameters() for n, v in vars(p).items() if n != "low_bits" and torch.is_tensor(v)
            ]
        middles[split] = weights(model)
        write(tmp_path / str(split), optimizer)
        steps(model, optimizer, range(5, 9))
        ends[split] = weights(model)
    same(middles[True], middles[False], name)
    same(ends[True], ends[False], name)
    for split in (False, True):  # a checkpoint of either goes on in the other
        model, optimizer = made(folder, config, split, device)
        state.put_weights(model, {key: value.cpu() for key, value in middles[not split].items()})
        state.load_optimizer(optimizer, tmp_path / str(not split))
        steps(model, optimizer, range(5, 9))
        same(weights(model), ends[False], f"{name}, loaded")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ON_GPU])
def test_split_weights_go_where_float32_weights_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    check(folder, tmp_path, monkeypatch, name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_split_weights_go_where_float32_weights_go_on_a_gpu(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    check(folder, tmp_path, monkeypatch, name, "cuda")


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_gradients_that_are_added_up_in_float32_are_taken_as_they_are(folder: Path, name: str) -> None:
    """As those of more than 16 passes a step, by a backward pass and under a schedule."""
    model, optimizer = made(folder, section(name, learning_rate=1e-3), True, "cpu", wide=())
    assert adamw.add_up_wide(model) > 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ids = torch.tensor([tiny.documents(1)[0][:4] * 4])
    losses = []
    for _ in range(6):
        for _ in range(2):
            loss = model(ids, labels=ids).loss
            loss.backward()
        assert model.lm_head.weight.dtype == torch.bfloat16 and model.lm_head.weight.grad.dtype == torch.float32
        optimizer.clip(1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["sgd", "muon"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_clipped_within_the_step(folder: Path, device: str, name: str) -> None:
    config = section(name, learning_rate=1e-3)
    plain, theirs = made(folder, config, False, device)
    halves, ours = made(folder, config, True, device)
    steps(plain, theirs, range(3), longest=0.5)
    steps(halves, ours, range(3), longest=0.5)
    # Muon makes a matrix orthogonal in 16 bits, which the last bit of a factor changes.
    close = {"rtol": 0.0, "atol": 5e-5} if name == "muon" else {"rtol": 1e-6, "atol": 1e-9}
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(halves)[key], value, **close)
    if name == "muon":  # whose steps have their own length
        return
    moved = weights(halves)["lm_head.weight"] - weights(made(folder, config, False, device)[0])["lm_head.weight"]
    assert 0 < float(moved.norm()) < 3 * 0.5 * 1e-3


def test_weights_without_a_gradient_rest_and_a_step_without_any_changes_nothing(folder: Path) -> None:
    model, optimizer = made(folder, section("lion_32bit", weight_decay=0.1), True, "cpu")
    before = weights(model)
    optimizer.step()
    same(weights(model), before, "no gradient")
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    optimizer.step()
    assert {key for key, value in weights(model).items() if not torch.equal(value, before[key])} == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer": "lion_8bit", "method": "full"}, True),
        ({"optimizer": "muon", "method": "full", "precision": "fp8"}, True),
        ({"optimizer": "stable_adamw", "method": "full"}, False),  # it counts steps for all weights at once
        ({"optimizer": "schedule_free_adamw", "method": "full", "schedule": "constant"}, False),
        ({"optimizer": "lion_8bit", "method": "full", "full": {"lisa": {}}}, False),
        ({"optimizer": "lion_8bit", "method": "full", "precision": "fp32"}, False),
        ({"optimizer": "lion_8bit", "method": "lora"}, False),  # adapters are small
    ],
)
def test_which_weights_are_split(changes: dict[str, Any], expected: bool) -> None:
    assert optimizers.can_split(TrainConfig.model_validate(changes)) == expected
