"""The attention function by itself: what it computes, and what it refuses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packing.attention import attend, register

LENGTHS = [5, 0, 33, 1, 17, 0, 0]
"""With empty documents, as unused boundaries make them."""


def qkv(heads: int = 4, key_heads: int = 2, size: int = 32, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shape = (1, heads, sum(LENGTHS), size)
    return tuple(torch.randn(1, h, shape[2], size, **options).requires_grad_() for h in (heads, key_heads, key_heads))  # type: ignore[return-value]


def boundaries(device: str = "cpu") -> Tensor:
    return torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)


def expected(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """One call with the whole mask, in float64: [1, T, heads, size]."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(document))
    behind = place[:, None] - place[None, :]
    mask = (document[:, None] == document[None, :]) & (behind >= 0) & (behind < (window or len(place)))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.to(q.device), scale=0.2)
    return out.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_each_document_by_itself(window: int | None) -> None:
    q, k, v = qkv()
    out, _ = attend(
        nn.Identity(), q, k, v, None, scaling=0.2, sliding_window=window, cu_seq_lens_q=boundaries(), max_length_q=64
    )
    wanted = expected(q, k, v, window)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for one, two in zip(found, torch.autograd.grad((wanted * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (32, 8, 128), (4, 4, 96), (16, 1, 256)])
def test_the_kernel_agrees(heads: int, key_heads: int, size: int, window: int | None) -> None:
    q, k, v = qkv(heads, key_heads, size, device="cuda", dtype=torch.bfloat16)
    out, _ = attend(
        nn.Identity(),
        q,
        k,
        v,
        None,
        scaling=0.2,
        sliding_window=window,
        cu_seq_lens_q=boundaries("cuda"),
        max_length_q=64,
    )
    wanted = expected(q, k, v, window)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    sought = torch.autograd.grad((wanted * weights).sum(), (q, k, v))
    for one, two in zip((out, *found), (wanted, *sought), strict=True):
        assert (one.double() - two.double()).norm() < 1e-2 * two.double().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("own", [False, True])
def test_weights_in_float32_change_nothing_under_autocast(device: str, dtype: torch.dtype, own: bool) -> None:
    """Queries and keys are float32 then, values are not. On a GPU this must come to the same kernel."""
    narrow = qkv(8, 2, 64, device=device, dtype=dtype)
    mixed = [each.detach().float().requires_grad_() for each in narrow[:2]]
    rest: dict[str, Any] = {"attention_mask": None, "cu_seq_lens_q": boundaries(device), "max_length_q": 64, "own": own}
    found = []
    for inputs in (narrow, (*mixed, narrow[2])):
        with torch.autocast(device, dtype):
            out, _ = attend(nn.Identity(), *inputs, **rest)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    if device == "cuda":
        assert found[1][0].dtype == dtype
    for one, two in zip(*found, strict=True):
        assert (one.double() - two.double()).norm() < 1e-2 * one.double().norm()


def call(**changes: Any) -> None:
    q, k, v = qkv()
    arguments: dict[str, Any] = {"attention_mask": None, "cu_seq_lens_q": boundaries(), "max_length_q": 64, **changes}
    attend(changes.pop("module", nn.Identity()), q, k, v, **{n: a for n, a in arguments.items() if n != "module"})


def test_what_it_would_get_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="does not pass `cu_seq_lens_q`"):
        call(cu_seq_lens_q=None)
    with pytest.raises(ValueError, match="without attention mask"):
        call(attention_mask=torch.ones(1))
    with pytest.raises(ValueError, match="not plain causal"):
        call(position_bias=torch.ones(1))
    encoder = nn.Identity()
    encoder.is_causal = False
    with pytest.raises(ValueError, match="not plain causal"):
        call(module=encoder)


def test_registering_twice_is_the_same_as_once() -> None:
    from transformers import AttentionInterface

    register()
    register()
    assert AttentionInterface()["regrow"] is attend
