"""A step's figures, brought from the device without making it wait, and what they say of speed.

The loss and the gradient norm of a step are copied to pinned memory behind the step's own kernels, and read when they
have arrived: the CPU keeps queueing the next step meanwhile.
"""

import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

AHEAD = 8
"""Steps that may be under way before the oldest one's figures are waited for."""

PEAKS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "A40": 150,
    "A6000": 155,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "T4": 65,
}
"""Dense bfloat16 (T4: float16) TFLOP/s with float32 accumulation of the tensor cores, by a part of the card's name, as
NVIDIA's data sheets give them."""


@dataclass
class Queue:
    """Figures under way from the device, oldest first."""

    waiting: deque[tuple[dict[str, Any], torch.Tensor, Any]] = field(default_factory=deque)

    def put(self, entry: dict[str, Any], **figures: torch.Tensor) -> None:
        """Enter a step: what is known of it, and scalars on the device."""
        stacked = torch.stack([figure.detach().float().reshape(()) for figure in figures.values()])
        entry = {**entry, **dict.fromkeys(figures)}
        if stacked.is_cuda:
            host = torch.empty(len(figures), pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            self.waiting.append((entry, host, arrived))
        else:
            self.waiting.append((entry, stacked, None))

    def take(self, wait: bool = False) -> Iterator[dict[str, Any]]:
        """The steps whose figures are here; all of them if `wait`."""
        while self.waiting:
            entry, figures, arrived = self.waiting[0]
            if arrived is not None and not arrived.query():
                if not wait and len(self.waiting) <= AHEAD:
                    return
                arrived.synchronize()
            self.waiting.popleft()
            names = [name for name, value in entry.items() if value is None]
            yield {**entry, **dict(zip(names, figures.tolist(), strict=True))}


class Counted(NamedTuple):
    """Weights that every token is multiplied with."""

    weights: int
    """Without embeddings and head; of experts, those that a token visits."""
    trained: int
    """Of these."""
    head_trains: bool


def model_flops(config: Any, counted: Counted, lengths: Sequence[int], trained: int) -> float:
    """Floating-point operations that one step's mathematics needs, forward and backward, nothing computed twice.

    After PaLM's appendix B (arXiv:2204.02311): 2 a weight and token forward, 2 for the gradient of its input and 2 for
    its own, which frozen weights do not need; attention costs 4 x layers x heads x head size a pair of tokens forward
    and twice that backward. Pairs are those within documents of `lengths`, each with what stands before it (PaLM counts
    all pairs of a sequence); the head projects `trained` tokens only.
    """
    text = config.get_text_config()
    tokens = float(np.sum(lengths, dtype=np.float64))
    pairs = float(np.sum(np.asarray(lengths, np.float64) ** 2)) / 2
    heads = getattr(text, "num_attention_heads", 0) or 0
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    attention = 12.0 * text.num_hidden_layers * heads * size * pairs
    head = (6.0 if counted.head_trains else 4.0) * text.hidden_size * text.vocab_size * trained
    return float(tokens * (4.0 * counted.weights + 2.0 * counted.trained) + attention + head)


def counted_weights(model: Any) -> Counted:
    """Count them, quantized ones as what they stand for."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = base.config.get_text_config()
    head = base.get_output_embeddings()
    ends = [each for each in (base.get_input_embeddings(), head) if each is not None]
    apart = {id(parameter) for each in ends for parameter in each.parameters()}  # and the copy that trains
    experts = next((n for name in EXPERTS if (n := getattr(text, name, None))), None)
    visited = getattr(text, "num_experts_per_tok", None)
    share = visited / experts if experts and visited else 1.0
    total = trained = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in apart or parameter.ndim < 2:
            continue
        packed = getattr(parameter, "quant_state", None)  # 4 bits
        part = math.prod(packed.shape if packed else parameter.shape) * (share if ".experts." in name else 1.0)
        total += part
        trained += part if parameter.requires_grad else 0.0
    return Counted(int(total), int(trained), head is not None and bool(head.weight.requires_grad))


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def peak_flops(device: str, told: float | None) -> float | None:
    """The device's FLOP/s in bfloat16: `told` (in TFLOP/s), else by the card's name; None if unknown."""
    if told is not None:
        return told * 1e12
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
