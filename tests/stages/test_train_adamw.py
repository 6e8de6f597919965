"""AdamW over split weights is AdamW over float32 weights: torch's own is the oracle."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from stages.errors import UserError
from stages.train import adamw, optimizers, state
from stages.train.adamw import SplitAdamW, add_up_wide, put, split, whole, whole_on_cpu, widen

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Triton's interpreter runs the kernel on a CPU: TRITON_INTERPRET=1 python -m pytest, where Triton is installed.
KERNEL = pytest.param("interpreter", marks=pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="no Triton"))


def layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 3, bias=False), nn.LayerNorm(3))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, device: str, first: int = 0) -> None:
    """Steps on gradients of seeded random numbers that bfloat16 holds, the same for every model."""
    for number in range(first, first + count):
        random = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=random).bfloat16()
            parameter.grad = gradient.to(device, parameter.dtype)
        optimizer.step()


def as_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.kernels.adamw import Weights

    def update(self: SplitAdamW, number: int, group: Any, parameters: list[Any], count: int) -> None:
        rates = {"learning_rate": group["lr"], "beta1": group["betas"][0], "beta2": group["betas"][1]}
        rates |= {"epsilon": group["eps"], "decay": group["weight_decay"], "step": count, "seed": count * 77777}
        Weights([(p, self.state[p]) for p in parameters]).update_([p.grad for p in parameters], self.factor, **rates)

    monkeypatch.setattr(SplitAdamW, "_update", update)


@pytest.mark.parametrize("device", [*DEVICES, KERNEL])
def test_split_weights_go_where_float32_weights_go(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "interpreter":
        as_interpreted(monkeypatch)
        device = "cpu"
    ours, theirs = layers().to(device), layers().to(device)
    split(ours)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    steps(ours, SplitAdamW(ours.parameters(), **SETTINGS), 20, device)
    steps(theirs, torch.optim.AdamW(theirs.parameters(), **SETTINGS), 20, device)
    before = layers().to(device)
    for our, their, old in zip(ours.parameters(), theirs.parameters(), before.parameters(), strict=True):
        assert (whole(our) - their).norm() < 1e-5 * (their - old).norm() + 1e-6 * their.norm()
        assert torch.equal(our, adamw._apart(whole(our))[0])


def test_an_update_too_small_for_bfloat16_is_not_lost() -> None:
    weight = nn.Parameter(torch.ones(8))
    split(nn.ParameterList([weight]))
    optimizer = SplitAdamW([weight], lr=1e-4)
    for _ in range(100):
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
    torch.testing.assert_close(whole(weight), torch.full((8,), 0.99), rtol=0, atol=1e-5)
    assert weight.tolist() == [0.98828125] * 8


@pytest.mark.parametrize("device", DEVICES)
def test_splitting_and_widening_change_no_bit(device: str) -> None:
    model = layers().to(device)
    before = [parameter.clone() for parameter in model.parameters()]
    split(model)
    widen(model)
    for now, then in zip(model.parameters(), before, strict=True):
        assert now.dtype == torch.float32
        assert torch.equal(now, then.cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_many_passes_are_added_up_without_loss(device: str) -> None:
    torch.manual_seed(0)
    made = nn.Linear(8, 8, bias=False).to(device)
    split(made)
    assert add_up_wide(made) == 1
    expected = torch.zeros(8, 8, dtype=torch.float64, device=device)
    for _ in range(1024):
        x = torch.rand(4, 8, dtype=torch.bfloat16, device=device)
        loss = made(x).sum()
        expected += torch.autograd.grad(loss, made.weight, retain_graph=True)[0].double()
        loss.backward()
    gradient: Any = made.weight.grad
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    before, optimizer = whole(made.weight).clone(), SplitAdamW(made.parameters(), lr=0.1)
    optimizer.step()
    assert torch.allclose(whole(made.weight), before - 0.1 * gradient.sign(), atol=1e-5)  # a first step's length
    optimizer.zero_grad()
    made(x).sum().backward()
    assert made.weight.grad is not None and made.weight.grad.dtype == torch.float32


def test_what_must_stay_wide_is_left_alone_and_what_is_frozen_fits_the_rest() -> None:
    model = layers()
    frozen = model[0].bias.requires_grad_(False)
    before = frozen.clone()
    split(model, wide=["2."])
    assert [p.dtype == torch.bfloat16 for p in model.parameters()] == [True, True, True, False, False]
    assert torch.equal(whole(frozen), before)
    steps(model, SplitAdamW((p for p in model.parameters() if p.requires_grad), **SETTINGS), 1, "cpu")


@pytest.mark.parametrize("device", [*DEVICES, KERNEL])
def test_moments_in_bfloat16_are_right_in_the_mean(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "interpreter":
        as_interpreted(monkeypatch)
        device = "cpu"
    weight = nn.Parameter(torch.zeros(1 << 13, device=device))
    optimizer = SplitAdamW([weight], lr=1e-3, betas=(0.9, 0.999), moments="bfloat16")
    for _ in range(30):
        weight.grad = torch.full_like(weight, 0.1)
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"].float()
    expected = 0.01 * (1 - 0.999**30)
    # Rounding to nearest would stop growing at a fraction of this: each step adds less than half a last place.
    assert second.mean().item() == pytest.approx(expected, rel=5e-3)
    assert second.std().item() > 0
    assert whole(weight).mean().item() == pytest.approx(-0.03, rel=1e-2)


def test_the_factor_scales_one_steps_gradients() -> None:
    ours, theirs = layers(), layers()
    for model, gradient, factor in ((ours, 1.0, 0.25), (theirs, 0.25, None)):
        split(model)
        optimizer = SplitAdamW(model.parameters(), **SETTINGS)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.factor = None if factor is None else torch.tensor(factor)
        optimizer.step()
        assert optimizer.factor is None
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(whole(our), whole(their))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_saved_optimizer_goes_on_bit_for_bit(device: str, moments: str) -> None:
    through = layers().to(device)
    split(through)
    optimizer = SplitAdamW(through.parameters(), **SETTINGS, moments=moments)
    steps(through, optimizer, 3, device)
    weights = {name: whole_on_cpu(parameter) for name, parameter in through.named_parameters()}
    saved = state.state_of(optimizer, keep=True)
    steps(through, optimizer, 3, device, first=3)

    again = layers(seed=1).to(device)
    split(again)
    resumed = SplitAdamW(again.parameters(), **SETTINGS, moments=moments)
    for name, parameter in again.named_parameters():
        put(parameter, weights[name])
    resumed.load_state_dict(saved)
    steps(again, resumed, 3, device, first=3)
    for our, their in zip(again.parameters(), through.parameters(), strict=True):
        assert torch.equal(whole(our), whole(their))


@pytest.mark.parametrize("first", ["split", "torch"])
def test_each_adamw_goes_on_where_the_other_was(first: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adamw, "PIECE", 100)  # so that a weight is copied in several

    def made(seed: int, is_split: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = layers(seed)
        if not is_split:
            return model, torch.optim.AdamW(model.parameters(), fused=True, **SETTINGS)
        split(model)
        return model, SplitAdamW(model.parameters(), **SETTINGS)

    through, oracle = made(0, False)
    steps(through, oracle, 6, "cpu")
    begun, optimizer = made(0, first == "split")
    steps(begun, optimizer, 3, "cpu")
    saved = state.weights_of(begun, keep=True)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    torch.save(state.state_of(optimizer, keep=True), tmp_path / state.OPTIMIZER)
    ended, other = made(1, first != "split")
    state.put_weights(ended, saved)
    for our, their in zip(ended.parameters(), begun.parameters(), strict=True):
        assert torch.equal(whole(our), whole(their))
    state.load_optimizer(other, tmp_path)
    if first == "split":
        assert other.param_groups[0]["fused"], "its own settings stay"
    steps(ended, other, 3, "cpu", first=3)
    for our, their, old in zip(ended.parameters(), through.parameters(), layers().parameters(), strict=True):
        assert (whole(our) - their).norm() < 1e-5 * (their - old).norm() + 1e-6 * their.norm()


def test_what_was_saved_in_halves_goes_on_as_it_was_and_nowhere_else(tmp_path: Path) -> None:
    """As checkpoints once were: 16 bits of each weight, and the others in the optimizer's state."""
    through = layers()
    split(through)
    optimizer = SplitAdamW(through.parameters(), **SETTINGS)
    steps(through, optimizer, 3, "cpu")
    weights = {name: parameter.detach().clone() for name, parameter in through.named_parameters()}
    described = optimizer.state_dict()
    for number, parameter in enumerate(through.parameters()):
        described["state"][number]["low_bits"] = parameter.low_bits
    torch.save(described, tmp_path / state.OPTIMIZER)
    steps(through, optimizer, 3, "cpu", first=3)

    again = layers(seed=1)
    split(again)
    resumed = SplitAdamW(again.parameters(), **SETTINGS)
    state.put_weights(again, weights)
    state.load_optimizer(resumed, tmp_path)
    steps(again, resumed, 3, "cpu", first=3)
    for our, their in zip(again.parameters(), through.parameters(), strict=True):
        assert torch.equal(whole(our), whole(their))
    with pytest.raises(UserError, match=r"holds only 16 bits of each weight \(0.weight\)"):
        state.put_weights(layers(), weights)


class Remembered:
    """Stands in for the kernel's `Weights`: updates the averages that it was made with, wherever they belong by now."""

    def __init__(self, weights: Sequence[tuple[torch.Tensor, Mapping[str, Any]]]) -> None:
        self.weights = [(weight, dict(held)) for weight, held in weights]

    def update_(self, gradients: Sequence[torch.Tensor], factor: torch.Tensor | None, **rates: Any) -> None:
        for (weight, held), gradient in zip(self.weights, gradients, strict=True):
            adamw.update_(weight, gradient, held, factor, **rates)


class Far(nn.Parameter):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("device", ["as if", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_that_were_forgotten_start_anew_on_a_gpu_as_on_a_cpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a restart (ReLoRA), or where a layer rests (LISA)."""
    found = []
    for place in ("cpu", device):
        model = layers().to("cuda" if place == "cuda" else "cpu")
        parameters = list(model.parameters())
        if place == "as if":
            monkeypatch.setitem(sys.modules, "stages.kernels.adamw", SimpleNamespace(Weights=Remembered))
            for parameter in parameters:
                parameter.__class__ = Far
        optimizer = SplitAdamW(parameters, **SETTINGS)
        steps(model, optimizer, 3, str(parameters[0].device))
        optimizers.forget(optimizer, parameters)
        steps(model, optimizer, 3, str(parameters[0].device), first=3)
        found.append([parameter.detach().cpu() for parameter in parameters])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.gpu
def test_the_kernel_is_compiled_in_the_first_step_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    model = layers().to("cuda")
    split(model)
    optimizer = SplitAdamW(model.parameters(), **SETTINGS)
    steps(model, optimizer, 1, "cuda")
    compiled: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **named: compiled.append(named["key"]))
    steps(model, optimizer, 40, "cuda", first=1)
    assert not compiled
