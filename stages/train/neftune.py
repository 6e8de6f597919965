"""NEFTune (arXiv:2310.05914): uniform noise on the embeddings while training, of size alpha / sqrt(tokens × width).

The tokens are those of each document: the noise of a document does not depend on what it is packed with.
"""

from typing import Any

import torch
from torch import Tensor

from stages import lm_head


def add_noise(model: Any, alpha: float) -> None:
    """Let a model's embeddings come out with noise while it trains. Drawn from torch's seed on the model's device."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    boundaries: Tensor | None = None

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal boundaries
        boundaries = kwargs.get("cu_seq_lens_q")

    def shake(module: Any, args: Any, embedded: Tensor) -> Tensor:
        if not causal.training:
            return embedded
        _, tokens, width = embedded.shape
        whole = torch.tensor([tokens], device=embedded.device)
        lengths = whole if boundaries is None else document_lengths(boundaries.to(embedded.device), tokens)
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * noise_size(alpha, lengths, width)[..., None].to(embedded.dtype)

    called = lm_head.decoder(causal) or causal
    called.register_forward_pre_hook(see, with_kwargs=True)
    causal.get_input_embeddings().register_forward_hook(shake)


def noise_size(alpha: float, lengths: Tensor, width: int) -> Tensor:
    """[tokens] How far noise may go for tokens of documents of these lengths, int32."""
    return alpha / (lengths.float() * width).sqrt()


def document_lengths(boundaries: Tensor, tokens: int) -> Tensor:
    """[tokens] For each token, how many tokens its document has, from the boundaries [documents + 1]. Told how many
    tokens there are, it waits for no device."""
    lengths = boundaries.diff()
    return torch.repeat_interleave(lengths, lengths, output_size=tokens)
