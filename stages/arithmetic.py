"""The arithmetic that a device really has.

A recipe says `bf16`, and on a GPU or a CPU with instructions for it that is what is computed. On a CPU without them
bfloat16 is emulated, 35 times slower than float32 and less exact (a product of 512 x 576 x 1536 on two cores with AVX2:
1.22 s against 0.035 s), so there float32 is computed instead, and the record says so. As between a CPU and a GPU, the
key stays: it says what was asked for.
"""

from functools import cache
from typing import TypeVar

P = TypeVar("P", bound=str)

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""What `torch.cpu.get_capabilities` calls instructions for bfloat16, on x86 and on ARM."""


def fitting(precision: P, device: str) -> P:
    """`precision`, or fp32 in place of bf16 on a CPU that has to emulate it."""
    emulated = precision == "bf16" and device == "cpu" and not cpu_has_bf16()
    return "fp32" if emulated else precision  # type: ignore[return-value]


@cache
def cpu_has_bf16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 itself."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(bool(found.get(name)) for name in INSTRUCTIONS)
    return bool(torch.cpu._is_avx512_bf16_supported())
