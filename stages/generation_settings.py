"""What a model's folder says of generating, which transformers fills in wherever a caller leaves something open."""

from functools import reduce
from typing import Any

from stages.turn_end import with_end


def keep_tokens(network: Any, *ends: int | None) -> None:
    """Leave of a network's own settings its begin, end and pad tokens, with `ends` among the ends.

    The rest is for who talks with the model: a repetition penalty is no greedy decoding, and what `min_p` or beams let
    through is no sample of what the model says.
    """
    from transformers import GenerationConfig

    own = network.generation_config
    network.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=reduce(with_end, ends, with_end(own.eos_token_id, None)) or None,
        pad_token_id=own.pad_token_id,
    )
