"""NEFTune (arXiv:2310.05914): uniform noise on the embeddings while training, of size alpha / sqrt(tokens × width).

The tokens are those of each document: the noise of a document does not depend on what it is packed with.
"""

from typing import Any

import torch
from torch import Tensor


def add_noise(model: Any, alpha: float) -> None:
    """Let a model's embeddings come out with noise while it trains. Drawn from torch's seed on the model's device."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    scales: list[Tensor] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        scales[:] = [document_lengths(kwargs["cu_seq_lens_q"])] if "cu_seq_lens_q" in kwargs else []

    def shake(module: Any, args: Any, embedded: Tensor) -> Tensor:
        if not causal.training:
            return embedded
        width = embedded.shape[-1]
        lengths = scales[0].to(embedded.device) if scales else torch.tensor([embedded.shape[1]], device=embedded.device)
        size = alpha / (lengths * width).sqrt()
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * size[..., None].to(embedded.dtype)

    causal.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
    causal.get_input_embeddings().register_forward_hook(shake)


def document_lengths(boundaries: Tensor) -> Tensor:
    """[tokens] For each token, how many tokens its document has, from the boundaries [documents + 1]."""
    lengths = boundaries.diff()
    return torch.repeat_interleave(lengths, lengths)
