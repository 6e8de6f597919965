"""Products in 8 bits stay near the plain layer's; where the sizes do not allow them, the layer is the plain one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.errors import UserError
from stages.runtime import Runtime
from stages.stage import Work, version_of
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
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", [False, True])
def test_output_and_gradients_are_near_the_plain_layers(device: str, frozen: bool) -> None:
    plain = layers(device).requires_grad_(not frozen)
    narrow = copy.deepcopy(plain)
    assert float8.convert([narrow]) == 2
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
    float8.convert([narrow])
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    assert torch.equal(narrow(x), plain(x))


def test_adapters_and_odd_sizes_are_not_converted() -> None:
    model = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(64, 16)}), "odd": nn.Linear(60, 64)})
    holder = nn.ModuleDict({"layer": model})
    assert float8.convert([holder]) == 0


def decoder(layers: int) -> list[nn.Module]:
    """Decoder layers of one that widens and one that narrows in attention, and in the feed-forward layer."""

    def pair() -> nn.Module:
        return nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)})

    return [nn.ModuleDict({"self_attn": pair(), "mlp": pair()}) for _ in range(layers)]


def test_choices_go_from_all_layers_to_few() -> None:
    each: Any = decoder(8)
    found = list(float8.choices(each).values())
    assert [len(chosen) for chosen in found] == [32, 24, 12, 6, 4]
    assert {id(m) for m in found[0]} == {id(m) for layer in each for m in layer.modules() if type(m) is nn.Linear}
    assert {id(m) for m in found[2]} == {id(m) for layer in each[1:-1] for m in layer["mlp"].values()}
    assert [id(m) for m in found[3]] == [id(layer["mlp"]["up"]) for layer in each[1:-1]]
    assert [id(m) for m in found[4]] == [id(layer["mlp"]["up"]) for layer in each[2:-2]]


def test_a_model_of_two_decoder_layers_has_no_choice_without_them() -> None:
    assert list(float8.choices(decoder(2))) == ["all"]


def test_only_what_is_chosen_computes_in_8_bits() -> None:
    each = decoder(4)
    able = float8.choices(each)["all"]
    for chosen in (able, able[2:4], []):
        float8.only(able, chosen)
        assert [isinstance(m, float8.Float8Linear) for m in able] == [any(m is c for c in chosen) for m in able]
        assert float8.choices(each)["all"] == able


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, **model: Any) -> Any:
    """The facts of a step in fp8, which a CPU emulates."""
    monkeypatch.setattr(checks, "refuse_device", lambda config, device: None)
    folder.mkdir()
    inputs = {"model": tiny.llama(folder / "model", **model), **tiny.plan(folder, tiny.documents(24))}
    (folder / "out").mkdir()
    config = TrainConfig.model_validate({"precision": "fp8", "method": "full", "max_steps": 1})
    return STAGE.run(config, inputs, folder / "out", Work(folder / "work", Runtime(device="cpu")))


def test_as_many_layers_compute_in_8_bits_as_the_loss_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, Any] = {}
    done: list[int] = []
    for name, largest in (("all", 0.5), ("fewer", None)):
        if largest is None:  # a little less than all change it by
            largest = 0.99 * abs(found["all"]["float8_loss_change"])
        monkeypatch.setattr(float8, "LARGEST_CHANGE", largest)
        found[name] = train(tmp_path / name, monkeypatch, num_hidden_layers=4)["speed"]
        done.append(found[name]["float8_layers"])
        assert 0 < abs(found[name]["float8_loss_change"]) < largest
        assert f"fp8: {done[-1]} of 28 linear layers ({found[name]['float8_choice']}), loss " in capfd.readouterr().out
    assert done[0] == 28 > done[1] > 0


def test_only_trainings_in_fp8_are_made_again_when_it_changes() -> None:
    versions = [version_of(STAGE, TrainConfig.model_validate({"precision": p})) for p in ("bf16", "fp8")]
    assert [name for name in versions[1] if name not in versions[0]] == ["precision:fp8"]


def test_a_model_that_even_few_layers_in_fp8_make_worse_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8, "LARGEST_CHANGE", 1e-9)
    with pytest.raises(UserError, match=r"changes by .* %, and by .* % with the fewest layers .* set bf16"):
        train(tmp_path / "bad", monkeypatch)
