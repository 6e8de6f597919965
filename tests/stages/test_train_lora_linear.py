"""A LoRA layer as one operation is PEFT's LoRA layer: the same output, the same gradients."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from stages.train import TrainConfig, model, speed
from stages.train import lora_linear as module
from stages.train.lora_linear import FastLinear, add_product, lora_linear, quicken
from tests.stages import tiny

MORE = ["muon", "schedule_free_adamw"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, bias=bias)
        self.second = nn.Linear(40, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.relu(self.first(x)))
        return out


def adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    bias = settings.pop("net_bias", True)
    options = {"r": 4, "lora_alpha": 10, "target_modules": ["first", "second"], "init_lora_weights": False, **settings}
    return get_peft_model(Net(bias), LoraConfig(**options))


def outcome(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    (y.float() ** 2).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in trained)]  # type: ignore[list-item]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("net_bias", [True, False])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_output_and_gradients_are_pefts(device: str, net_bias: bool, compiled: bool) -> None:
    theirs = adapted(net_bias=net_bias).to(device)
    ours = copy.deepcopy(theirs)
    assert quicken(ours) == 2
    x = torch.randn(2, 5, 24, device=device)
    run = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    trained = [p for p in ours.parameters() if p.requires_grad]
    for found, expected in zip(outcome(run, x), outcome(theirs, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(trained) == 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "optimizer", ["adamw_torch_fused", "adamw_torch", *(pytest.param(n, marks=pytest.mark.full) for n in MORE)]
)
def test_whatever_optimizer_holds_them_adapters_compute_in_16_bits_and_in_one_operation(
    tmp_path: Path, optimizer: str, device: str
) -> None:
    folder = tiny.save(tmp_path, "LlamaConfig", dtype="bfloat16")
    config = TrainConfig.model_validate({"optimizer": optimizer, "schedule": "constant", "lora": {"rank": 4}})
    made = model.ready(model.load(folder, config, device, True), config, folder, device, lambda: [])
    for name, parameter in made.named_parameters():
        if "lora_B" in name:  # zeros, through which no gradient would pass
            nn.init.normal_(parameter, std=0.1)
    boundaries = torch.tensor([0, 30], dtype=torch.int32, device=device)
    given: dict[str, Any] = {"input_ids": torch.arange(30, device=device)[None], "use_cache": False}
    given |= {f"cu_seq_lens_{side}": boundaries for side in "qk"} | {f"max_length_{side}": 32 for side in "qk"}
    exact = model.ready(model.load(folder, config, "cpu", True), config, folder, "cpu", lambda: []).double()
    exact.load_state_dict(made.state_dict())

    def gradients(of: Any) -> list[torch.Tensor]:
        where = next(of.parameters()).device
        inputs = {name: each.to(where) if isinstance(each, torch.Tensor) else each for name, each in given.items()}
        with speed.autocast(of, config, where.type):
            loss = of(**inputs).logits.float().square().mean()
        found = torch.autograd.grad(loss, [p for p in of.parameters() if p.requires_grad])
        return [gradient.double().cpu() for gradient in found]

    truth, parts = gradients(exact), gradients(made)
    done = speed.hold(made, config)
    assert (done["fused_adapters"], done["fused_feed_forwards"], done["fused_attentions"]) == (14, 2, 2)
    held = torch.bfloat16 if optimizer == "adamw_torch_fused" else torch.float32
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {held}
    for one, part, true in zip(gradients(made), parts, truth, strict=True):
        assert (one - true).norm() <= 1.5 * (part - true).norm() + 0.01 * true.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "width"), [(8, 32), (7, 32), (8, 40), (8, 7), (0, 32)])
def test_a_product_is_added_whole_or_in_halves(
    rows: int, width: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HALVED_FROM", 8)
    onto, left = torch.randn(rows, width, device=device), torch.randn(rows, 6, device=device)
    for right in (torch.randn(6, width, device=device), torch.randn(width, 6, device=device).T):
        wanted = onto + left @ right
        add_product(found := onto.clone(), left, right)
        torch.testing.assert_close(found, wanted)


def test_the_operation_is_sound() -> None:
    x, weight, a, b = (torch.randn(*shape, requires_grad=shape != (7, 6)) for shape in ((3, 6), (7, 6), (2, 6), (7, 2)))
    torch.library.opcheck(lora_linear, (x, weight, None, None, a, b, 0.5))


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}],
    ids=["a variant", "dropout", "a bias in the adapter"],
)
def test_what_is_more_than_lora_is_left_to_peft(settings: dict[str, Any]) -> None:
    assert quicken(adapted(**settings)) == 0


def test_switched_off_and_merged_adapters_are_pefts_affair() -> None:
    model = adapted()
    x = torch.randn(3, 24)
    expected = model(x)
    quicken(model)
    assert any(isinstance(module, FastLinear) for module in model.modules())
    with model.disable_adapter():
        assert not torch.allclose(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
