"""Products in 8 bits stay near the plain layer's; where the sizes do not allow them, the layer is the plain one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.errors import UserError
from stages.runtime import Runtime
from stages.stage import Work
from stages.train import STAGE, TrainConfig, checks, float8
from tests.stages import tiny

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def layers(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 32)).to(device, torch.bfloat16)


def outcome(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y.float() ** 2).mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", [False, True])
def test_output_and_gradients_are_near_the_plain_layers(device: str, frozen: bool) -> None:
    plain = layers(device).requires_grad_(not frozen)
    narrow = copy.deepcopy(plain)
    assert float8.convert(narrow) == 2
    x = torch.randn(4, 8, 64, device=device, dtype=torch.bfloat16)
    for found, expected in zip(outcome(narrow, x), outcome(plain, x), strict=True):
        assert found.dtype == expected.dtype
        difference = (found.float() - expected.float()).norm() / expected.float().norm()
        assert 0 < difference < 0.1  # e4m3 has four significant bits, e5m2 three


def test_one_large_number_takes_no_bits_from_a_value_of_its_size() -> None:
    value = torch.tensor([448000.0, 1000.0, -250.0])
    narrow, scale = float8.scaled(value, torch.float8_e4m3fn)
    torch.testing.assert_close(narrow.float() * scale, value, rtol=0.07, atol=0)


def test_rows_that_are_no_multiple_of_16_are_computed_plainly() -> None:
    plain = layers()
    narrow = copy.deepcopy(plain)
    float8.convert(narrow)
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    assert torch.equal(narrow(x), plain(x))


def test_adapters_and_odd_sizes_are_not_converted() -> None:
    model = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(64, 16)}), "odd": nn.Linear(60, 64)})
    holder = nn.ModuleDict({"layer": model})
    assert float8.convert(holder) == 0


def test_the_change_of_a_loss_is_measured_against_the_plain_layers_and_leaves_them_narrow() -> None:
    narrow = layers()
    plain = copy.deepcopy(narrow)
    float8.convert(narrow)
    x = torch.randn(16, 64, dtype=torch.bfloat16)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(model(x).float().square().mean())

    change = float8.loss_change(narrow, lambda: loss(narrow))
    assert change == loss(narrow) / loss(plain) - 1 != 0.0
    assert all(isinstance(layer, float8.Float8Linear) for layer in narrow)


def test_a_model_that_fp8_makes_worse_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "refuse_device", lambda config, device: None)  # of a CPU, which emulates the products
    inputs = {"model": tiny.llama(tmp_path / "model"), **tiny.plan(tmp_path, tiny.documents(24))}
    config = TrainConfig.model_validate({"precision": "fp8", "method": "full", "max_steps": 1})
    work = Work(tmp_path / "work", Runtime(device="cpu"))
    for name, largest in (("good", 0.5), ("bad", 1e-9)):
        monkeypatch.setattr(float8, "LARGEST_CHANGE", largest)
        (tmp_path / name).mkdir()
        if name == "good":
            facts: Any = STAGE.run(config, inputs, tmp_path / name, work)
            assert 0 < abs(facts["speed"]["float8_loss_change"]) < largest
        else:
            with pytest.raises(UserError, match=r"in fp8 the model's loss on its own data changes by .* set bf16"):
                STAGE.run(config, inputs, tmp_path / name, work)
