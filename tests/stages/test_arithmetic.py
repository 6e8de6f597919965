"""bf16 is computed where there are instructions for it; elsewhere float32 is, and nothing else changes."""

import pytest
import torch

from stages import arithmetic


@pytest.mark.parametrize(
    ("precision", "device", "has", "computed"),
    [
        ("bf16", "cpu", False, "fp32"),
        ("bf16", "cpu", True, "bf16"),
        ("bf16", "cuda", False, "bf16"),
        ("fp32", "cpu", False, "fp32"),
        ("fp16", "cpu", False, "fp16"),
    ],
)
def test_only_emulated_bf16_is_replaced(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, has: bool, computed: str
) -> None:
    monkeypatch.setattr(arithmetic, "cpu_has_bf16", lambda: has)
    assert arithmetic.fitting(precision, device) == computed


def test_the_names_are_torchs() -> None:
    if torch.cpu.get_capabilities()["architecture"] == "x86_64":
        assert {"avx512_bf16", "amx_bf16"} <= set(torch.cpu.get_capabilities())
