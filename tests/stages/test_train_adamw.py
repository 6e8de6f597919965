"""AdamW over split weights is AdamW over float32 weights: torch's own is the oracle."""

import os
from typing import Any

import pytest
import torch
from torch import nn

from stages.train import adamw
from stages.train.adamw import SplitAdamW, split, whole, widen

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
    weights = {name: value.clone() for name, value in through.state_dict().items()}
    state = {"state": optimizer.state_dict()["state"], "param_groups": optimizer.state_dict()["param_groups"]}
    state["state"] = {
        k: {n: v.clone() if torch.is_tensor(v) else v for n, v in s.items()} for k, s in state["state"].items()
    }
    steps(through, optimizer, 3, device, first=3)

    again = layers(seed=1).to(device)
    split(again)
    resumed = SplitAdamW(again.parameters(), **SETTINGS, moments=moments)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    steps(again, resumed, 3, device, first=3)
    for our, their in zip(again.parameters(), through.parameters(), strict=True):
        assert torch.equal(whole(our), whole(their))


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
