"""AdamW over many weights in one launch: see `stages.train.adamw`, whose torch path computes the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Weights"]

BLOCK = 4096
"""Numbers of a weight that one program updates."""
ALIGNED = 16
"""Sizes that are multiples of this are read and written 16 bytes at a time."""


@triton.jit
def _shake(value, random):
    """The upper 16 bits of a float32 as an int32, rounded up with the probability that the lower ones say."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits + (random & 0xFFFF)) >> 16


@triton.jit
def _at(addresses, index, at, like: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the numbers `at` of a tensor whose address stands in a table."""
    pointers = tl.load(addresses + index).to(tl.pointer_type(like)) + at
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [16])
    return pointers


@triton.jit(do_not_specialize=["seed"])  # another one each step: Triton would compile it again for multiples of 16
def _update(
    parameters, remainders, gradients, firsts, seconds, counts, owners, starts, factor,
    learning_rate, beta1, beta2, epsilon, decay, correction1, correction2, seed,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, MOMENT: tl.constexpr,
    NARROW: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = tl.load(owners + program)
    at = tl.load(starts + program) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + index)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    mask = at < count
    parameter = _at(parameters, index, at, WEIGHT, ALIGNED)
    first = _at(firsts, index, at, MOMENT, ALIGNED)
    second = _at(seconds, index, at, MOMENT, ALIGNED)
    g = tl.load(_at(gradients, index, at, GRADIENT, ALIGNED), mask=mask).to(tl.float32)
    if SCALED:
        g *= tl.load(factor)
    if SPLIT:
        remainder = _at(remainders, index, at, tl.int16, ALIGNED)
        high = tl.load(parameter, mask=mask).to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.load(remainder, mask=mask).to(tl.int32)
        w = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        w = tl.load(parameter, mask=mask).to(tl.float32)
    m = tl.load(first, mask=mask).to(tl.float32)
    v = tl.load(second, mask=mask).to(tl.float32)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    w *= 1 - learning_rate * decay
    w -= learning_rate / correction1 * m / (tl.sqrt(v / correction2) + epsilon)
    if SPLIT:
        bits = w.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(parameter, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(remainder, (bits - (high << 16)).to(tl.int16), mask=mask)
    else:
        tl.store(parameter, w, mask=mask)
    if NARROW:
        random = (at.to(tl.uint32) * 0x9E3779B9) ^ (seed + index * 0x61C88647).to(tl.uint32)
        random ^= random >> 16
        random *= 0x21F0AAAD
        random ^= random >> 15
        random *= 0xD35A2D97
        random ^= random >> 15
        tl.store(first, _shake(m, random.to(tl.int32, bitcast=True)).to(tl.int16).to(MOMENT, bitcast=True), mask=mask)
        random = (random >> 16).to(tl.int32, bitcast=True)
        tl.store(second, _shake(v, random).to(tl.int16).to(MOMENT, bitcast=True), mask=mask)
    else:
        tl.store(first, m, mask=mask)
        tl.store(second, v, mask=mask)


class Weights:
    """Weights with their states, `(weight, state)` each: their addresses are looked up once."""

    def __init__(self, weights: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> None:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, (weight, state) in enumerate(weights):
            assert weight.is_contiguous(), "the kernel walks through memory"
            tensors = [weight, *(value for value in state.values() if isinstance(value, Tensor))]
            aligned = weight.numel() % ALIGNED == 0 and all(each.data_ptr() % ALIGNED == 0 for each in tensors)
            kind = (weight.dtype, state["exp_avg"].dtype, "low_bits" in state, aligned)
            kinds.setdefault(kind, []).append(number)
        self._parts = [_Part(kind, numbers, weights) for kind, numbers in kinds.items()]

    def update_(self, gradients: Sequence[Tensor], factor: Tensor | None, **rates: Any) -> None:
        """One step. See `stages.train.adamw.update_`."""
        for part in self._parts:
            part.update_([_contiguous(gradients[number]) for number in part.numbers], factor, **rates)


def _contiguous(gradient: Tensor) -> Tensor:
    """The gradient where the kernel can read it: without gaps, at an address it can load 16 bytes from."""
    return (
        gradient
        if gradient.is_contiguous() and gradient.data_ptr() % ALIGNED == 0
        else gradient.clone(memory_format=torch.contiguous_format)
    )


class _Part:
    """Weights that one launch serves: of the same dtypes."""

    def __init__(
        self, kind: tuple[Any, ...], numbers: list[int], weights: Sequence[tuple[Tensor, Mapping[str, Any]]]
    ) -> None:
        self.dtype, self.moment, self.split, self.aligned = kind
        self.numbers = numbers
        mine = [weights[number] for number in numbers]
        device = mine[0][0].device

        def table(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        blocks = [triton.cdiv(weight.numel(), BLOCK) for weight, _ in mine]
        self.owners = torch.repeat_interleave(torch.arange(len(mine), dtype=torch.int32), torch.tensor(blocks))
        self.owners = self.owners.to(device)
        self.starts = torch.cat([torch.arange(each, dtype=torch.int64) for each in blocks]).to(device)
        self.counts = table([weight.numel() for weight, _ in mine])
        self.parameters = table([weight.data_ptr() for weight, _ in mine])
        self.firsts = table([state["exp_avg"].data_ptr() for _, state in mine])
        self.seconds = table([state["exp_avg_sq"].data_ptr() for _, state in mine])
        self.remainders = table([state["low_bits"].data_ptr() if self.split else 0 for _, state in mine])

    def update_(
        self, gradients: list[Tensor], factor: Tensor | None,
        *, learning_rate: float, beta1: float, beta2: float, epsilon: float, decay: float, step: int, seed: int,
    ) -> None:  # fmt: skip
        addresses = torch.tensor([gradient.data_ptr() for gradient in gradients], dtype=torch.int64)
        if self.counts.is_cuda:
            addresses = addresses.pin_memory()
        addresses = addresses.to(self.counts.device, non_blocking=True)
        kernel: Any = _update
        kernel[(len(self.owners),)](
            self.parameters, self.remainders, addresses, self.firsts, self.seconds, self.counts, self.owners,
            self.starts, self.counts if factor is None else factor,
            learning_rate, beta1, beta2, epsilon, decay, 1 - beta1**step, 1 - beta2**step, seed,
            WEIGHT=_LIKE[self.dtype], GRADIENT=_LIKE[gradients[0].dtype], MOMENT=_LIKE[self.moment],
            NARROW=self.moment == torch.bfloat16, SPLIT=self.split,
            SCALED=factor is not None, ALIGNED=self.aligned, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


_LIKE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
