"""How many tokens of one document a model can attend to, as its config and its weights say.

beyond(network, longest)      # what to tell of longer documents, or UserError where no position is left for them
"""

from typing import Any

from stages.errors import UserError

__all__ = ["beyond", "learned"]


def learned(network: Any) -> int | None:
    """The positions that a model has learned a vector for; None of one that computes them."""
    from torch import nn

    context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    words = network.get_input_embeddings()
    tables = [m.num_embeddings for m in network.modules() if isinstance(m, nn.Embedding) and m is not words]
    # OPT's begin at the third.
    return context if context is not None and any(context <= size <= context + 2 for size in tables) else None


def beyond(network: Any, longest: int) -> str | None:
    """What to tell where documents have more tokens than the model was made for. Raises UserError where it has learned
    positions, and none for the last of them."""
    context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if context is None or longest <= context:
        return None
    told = f"documents have up to {longest:,} tokens, and the model {context:,} positions (max_position_embeddings)"
    if learned(network) is not None:
        raise UserError(f"train: {told}, for which it learned vectors: set pack.sequence_length: {context}")
    return (
        f"{told}: what lies beyond is new to it. That may be meant; else set pack.sequence_length: {context}, or a "
        "scaling of its positions in the model's config"
    )
