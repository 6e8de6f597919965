"""Our own attention kernels: when they are taken, and that they compute what attention is.

Triton's interpreter runs them on a CPU: TRITON_INTERPRET=1 python -m pytest, where Triton is installed.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config

from packing import flash, hopper
from packing.attention import attend, implementation

WHERE = pytest.param("cpu", marks=pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="no Triton"))
DEVICES = [WHERE, pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = [130, 0, 1, 40, 77, 64, 3, 0]
"""Blocks of 64 keys and of up to 64 queries begin and end anywhere in these."""
LAYOUTS = ("tokens first", "heads first", "beside one another", "size first")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(heads: int, key_heads: int, size: int, device: str, layout: str = LAYOUTS[0]) -> Inputs:
    """Query, keys and values [1, heads, T, size] as they may lie in memory, boundaries, and sinks."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    counts, tokens = [heads, key_heads, key_heads], sum(LENGTHS)
    beside = torch.randn(1, tokens, sum(counts) + 1, size, device=device, dtype=dtype)
    parts = [part.transpose(1, 2) for part in beside[:, :, :-1].split(counts, 2)]
    if layout == "tokens first":
        parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    elif layout == "heads first":
        parts = [part.contiguous() for part in parts]
    elif layout == "size first":
        parts = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in parts]
    q, k, v = (part.detach().requires_grad_() for part in parts)
    ends = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
    boundaries = torch.stack([ends, ends], 1)[:, 0]  # not one after another in memory, and neither are the sinks
    return q, k, v, boundaries, torch.randn(2 * heads, device=device, dtype=dtype)[::2].requires_grad_()


def own(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, sinks: Tensor | None, window: int | None) -> Tensor:
    rows = [each[0].transpose(0, 1) for each in (q, k, v)]
    out: Tensor = hopper.attention(*rows, boundaries, sinks, 0.1, window)[0]
    return out[None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("window", "with_sinks"), [(None, False), (50, False), (1, True), (2**31 - 1, True)])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "layout"),
    [
        (8, 2, 64, LAYOUTS[0]),
        (7, 1, 128, LAYOUTS[1]),
        (6, 2, 64, LAYOUTS[2]),
        (4, 4, 128, LAYOUTS[3]),
        (16, 1, 64, LAYOUTS[2]),
    ],
)
def test_output_and_gradients_are_those_of_each_document_by_itself(
    heads: int, key_heads: int, size: int, layout: str, window: int | None, with_sinks: bool, device: str
) -> None:
    q, k, v, boundaries, sinks = inputs(heads, key_heads, size, device, layout)
    learned = [q, k, v, *([sinks] if with_sinks else [])]
    out = own(q, k, v, boundaries, sinks if with_sinks else None, window)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), learned)
    wide = [each.detach().float().requires_grad_() for each in learned]
    wanted, _ = attend(
        nn.Identity(), *wide[:3], None, 0.1, sliding_window=window, s_aux=wide[3] if with_sinks else None,
        cu_seq_lens_q=boundaries,
    )  # fmt: skip
    sought = torch.autograd.grad((wanted * weights).sum(), wide)
    tolerance = 1e-5 if device == "cpu" else 1e-2
    for one, two in zip((out, *found), (wanted, *sought), strict=True):
        assert (one.float() - two).norm() <= tolerance * two.norm()


@pytest.mark.gpu
def test_the_same_bits_every_time_and_under_torch_compile() -> None:
    q, k, v, boundaries, _ = inputs(8, 2, 64, "cuda")
    compiled = torch.compile(own, fullgraph=True)
    weights = torch.randn_like(own(q, k, v, boundaries, None, None))
    first: list[Tensor] = []
    for function in (own, own, compiled):
        out = function(q, k, v, boundaries, None, None)
        found = [out, *torch.autograd.grad((out * weights).sum(), (q, k, v))]
        first = first or found
        assert all(map(torch.equal, found, first))


@pytest.mark.gpu
def test_kernels_are_compiled_for_the_first_batch_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    def step(tokens: int, documents: int) -> None:
        q, k, v = (torch.randn(tokens, heads, 64, device="cuda").bfloat16() for heads in (8, 2, 2))
        boundaries = torch.tensor([*range(documents), tokens], dtype=torch.int32, device="cuda")
        hopper.attention(q.requires_grad_(), k, v, boundaries, None, 0.1, None)[0].sum().backward()

    step(200, 3)
    compiled: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **named: compiled.append(named["key"]))
    for tokens, documents in ((200, 1), (208, 16), (201, 17), (1, 1)):
        step(tokens, documents)
    assert not compiled


def test_two_graphs_serve_rows_of_every_length() -> None:
    graphs = []

    def remember(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., tuple[Tensor]]:
        graphs.append(graph)
        return lambda *_: (torch.empty(0),)

    def attention(rows: Tensor, boundaries: Tensor) -> Tensor:
        out, _, lows, highs = hopper.attention(rows, rows, rows, boundaries, None, 0.1, None)
        return out + (lows + highs)[:, None, None]

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=remember, fullgraph=True)
    for length in (20, 30, 40, 50):
        compiled(torch.empty(length, 4, 64), torch.tensor([0, length], dtype=torch.int32))
    assert len(graphs) == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 50])
def test_it_is_an_operation_that_torchs_own_checks_pass(window: int | None, device: str) -> None:
    q, k, v, boundaries, sinks = inputs(8, 2, 64, device)
    rows = [each[0].transpose(0, 1) for each in (q, k, v)]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(hopper.attention, (*rows, boundaries, sinks, 0.1, window), test_utils=checks)


@pytest.mark.gpu
def test_models_on_hopper_get_it_where_it_fits() -> None:
    if torch.cuda.get_device_capability()[0] != hopper.HOPPER:
        pytest.skip("no Hopper")
    q, k, v, boundaries, sinks = inputs(8, 2, 64, "cuda")
    out, _ = attend(nn.Identity(), q, k, v, None, 0.1, s_aux=sinks, cu_seq_lens_q=boundaries, own=True)
    assert torch.equal(out, own(q, k, v, boundaries, sinks, None))
    q, k, v, boundaries, _ = inputs(5, 1, 96, "cuda")
    boundaries = boundaries.contiguous()  # torch's kernel wants them so
    out, _ = attend(nn.Identity(), q, k, v, None, 0.1, cu_seq_lens_q=boundaries, max_length_q=256, own=True)
    wanted, _ = attend(nn.Identity(), q.float(), k.float(), v.float(), None, 0.1, cu_seq_lens_q=boundaries)
    assert (out.float() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "value_size", "taken"),
    [
        (32, 8, 128, 128, True),
        (32, 8, 64, 64, True),
        (28, 4, 128, 128, True),  # blocks with room for 8, of which 7 are used
        (9, 3, 64, 64, True),
        (64, 1, 64, 64, False),  # more than a block holds
        (40, 8, 128, 128, False),  # 5 of 8 are too few
        (16, 16, 192, 128, False),
        (8, 4, 256, 256, False),
        (12, 12, 96, 96, False),
    ],
)
def test_heads_that_fit(heads: int, key_heads: int, size: int, value_size: int, taken: bool) -> None:
    q, k, v = (torch.empty(1, h, 4, s) for h, s in ((heads, size), (key_heads, size), (key_heads, value_size)))
    assert hopper.fits(q, k, v) is taken


@pytest.mark.parametrize(
    ("capability", "installed", "softcap", "auto", "torchs"),
    [
        ((9, 0), None, None, "regrow_hopper", "regrow"),
        ((8, 0), None, None, "regrow", "regrow"),
        ((10, 0), None, None, "regrow", "regrow"),
        ((9, 0), 4, None, "regrow_fa4", "regrow"),
        ((9, 0), 2, None, "regrow_hopper", "regrow"),
        ((9, 0), 2, 30.0, "regrow_fa2", "regrow"),
        ((8, 0), 2, None, "regrow_fa2", "regrow"),
    ],
)
def test_the_fastest_kernel_that_is_there_is_taken(
    capability: tuple[int, int], installed: int | None, softcap: float | None, auto: str, torchs: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(flash, "installed", lambda _: installed)
    config = Gemma2Config(attn_logit_softcapping=softcap)
    assert implementation("cuda", config) == auto
    assert implementation("cuda", config, kernel="torch") == torchs
    if installed:
        assert implementation("cuda", config, kernel="flash") == f"regrow_fa{installed}"
