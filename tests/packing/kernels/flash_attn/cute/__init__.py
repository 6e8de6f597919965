"""The signature of flash-attn 4 (4.0.0b36), in PyTorch."""

from flash_attn.cute.interface import flash_attn_varlen_func

__all__ = ["flash_attn_varlen_func"]
