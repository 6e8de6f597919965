"""The loss head in chunks is the plain formula over all logits: the same loss, the same gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from packing.collate import PackedBins, collate
from stages import loss_head, objectives
from tests.stages import tiny

TOKENS, WIDTH, VOCABULARY = 61, 24, 97


def plain(hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return torch.nn.functional.cross_entropy(logits[positions], targets, reduction="sum")


def example(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(count)
    hidden = torch.randn(TOKENS, WIDTH, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=random).to(dtype).requires_grad_()
    positions = torch.randperm(TOKENS, generator=random)[:count].sort().values
    return hidden, weight, positions, torch.randint(VOCABULARY, (count,), generator=random)


@pytest.mark.parametrize("chunk", [1, 7, 4096])
@pytest.mark.parametrize("count", [0, 1, 7, 40, TOKENS])
def test_loss_and_gradients_are_the_plain_formulas(monkeypatch: pytest.MonkeyPatch, chunk: int, count: int) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", chunk)
    hidden, weight, positions, targets = example(count)
    expected = plain(hidden, weight, positions, targets)
    gradients = torch.autograd.grad(expected / 3, (hidden, weight))
    found = loss_head.linear_cross_entropy(hidden, weight, positions, targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found / 3, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 4096])
@pytest.mark.parametrize("count", [0, 1, 40, TOKENS])
def test_losses_one_by_one_take_any_gradient(monkeypatch: pytest.MonkeyPatch, chunk: int, count: int) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", chunk)
    hidden, weight, positions, targets = example(count)
    factors = torch.linspace(-1.0, 2.0, count)
    logits = (hidden @ weight.T)[positions]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    gradients = torch.autograd.grad((expected * factors).sum(), (hidden, weight))
    found = loss_head.linear_token_losses(hidden, weight, positions, targets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad((found * factors).sum(), (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_under_autocast_weights_keep_their_float32_gradients() -> None:
    hidden, weight, positions, targets = example(40)
    expected = plain(hidden, weight, positions, targets)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_head.linear_cross_entropy(hidden, weight, positions, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    for ours, theirs in zip(torch.autograd.grad(found, (hidden, weight)), gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_sum_over_all_rows_may_be_more_than_float16_holds() -> None:
    """A frequent token behind a hidden number that is large everywhere: no scaling of the loss reaches the sum."""
    torch.manual_seed(0)
    rows, width, vocabulary = 8192, 32, 64
    hidden = torch.randn(rows, width)
    hidden[:, 0] = 200
    targets = torch.where(torch.rand(rows) < 0.1, 7, torch.randint(0, vocabulary, (rows,)))
    weight = (torch.randn(vocabulary, width) * 0.02).half()
    found = []
    for dtype in (torch.float16, torch.float64):
        head = weight.detach().to(dtype).requires_grad_()
        loss = loss_head.linear_cross_entropy(hidden.half().to(dtype), head, torch.arange(rows), targets)
        (loss / rows).backward()
        assert head.grad is not None
        found.append(head.grad.double())
    assert (found[0] - found[1]).norm() < 1e-2 * found[1].norm()


def test_a_frozen_head_gets_no_gradient_and_evaluation_computes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, positions, targets = example(9)
    weight.requires_grad_(False)
    loss_head.linear_cross_entropy(hidden, weight, positions, targets).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is None
    asked: list[bool] = []
    compute = loss_head.cross_entropy_
    monkeypatch.setattr(
        loss_head,
        "cross_entropy_",
        lambda *given: asked.append(given[2]) or compute(*given),  # type: ignore[func-returns-value]
    )
    with torch.no_grad():
        loss_head.linear_cross_entropy(hidden, weight, positions, targets)
    assert asked == [False]


@given(st.integers(0, 10**6))
def test_chunks_are_few_and_of_one_size_but_for_the_last(rows: int) -> None:
    parts = list(loss_head.chunks(rows))
    sizes = [part.stop - part.start for part in parts]
    assert [0, *(part.stop for part in parts)] == [*(part.start for part in parts), rows]
    assert len(parts) == -(-rows // loss_head.CHUNK)
    assert len(set(sizes[:-1])) <= 1
    assert all(sizes[0] - len(parts) < size <= loss_head.CHUNK for size in sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gradient_is_scaled_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    values = torch.randn(1001, 77, device="cuda").to(dtype)
    factor = torch.tensor(1 / 16_391, device="cuda")
    assert torch.equal(loss_head.scale_(values.clone(), factor), (values.float() * factor).to(dtype))


class Largest(TorchDispatchMode):
    """Watches what is computed while it is on: the most numbers of any tensor."""

    numbers = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return made


@pytest.mark.parametrize("one_by_one", [False, True])
def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch, one_by_one: bool) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", 7)
    hidden, weight, positions, targets = example(40)
    compute = loss_head.linear_token_losses if one_by_one else loss_head.linear_cross_entropy
    with Largest() as ours:
        compute(hidden, weight, positions, targets).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert ours.numbers <= max(weight.numel(), hidden.numel()) < 40 * VOCABULARY
    with Largest() as theirs:
        plain(hidden, weight, positions, targets).backward()
    assert theirs.numbers == TOKENS * VOCABULARY


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_nor_is_one_in_a_step_of_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    from transformers import AutoModelForCausalLM

    words = 4096
    monkeypatch.setattr(loss_head, "CHUNK", 16)
    model = AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path / "model", vocab_size=words))
    inputs = tiny.plan(tmp_path, tiny.documents(12), sequence_length=256)  # one bin, of six pairs where they are pairs
    batch: dict[str, Any] = collate([PackedBins(**inputs)[0]])
    batch["reference"] = torch.zeros(batch["input_ids"].shape)
    chosen = objectives.find(objective)
    batch = chosen.prepare(batch)
    loss = chosen.loss(model, objectives.options_of(objective, {}), batch)
    with Largest() as ours:
        loss(batch)["loss"].backward()  # type: ignore[no-untyped-call]
    trained = len(batch["positions"])
    assert trained * words > words * 32, "more tokens than a hidden state is wide"
    assert ours.numbers == words * 32, "the head's weights, and their gradient"
