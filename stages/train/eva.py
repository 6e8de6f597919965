"""EVA (arXiv:2410.07170): adapters that start from what their layers are given, through PEFT.

PEFT goes on until the directions of every layer stay the same, which for some layers is never: that is told here.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from peft import PeftModel

from stages.errors import UserError
from stages.train.patterns import some

MOST_PASSES = 1000
"""Batches within which the directions must have settled: tiny models took 10 to 14."""


def start_from_activations(model: PeftModel, batches: Sequence[dict[str, Any]]) -> None:
    """Let every A start from the directions in which its layer's inputs vary most over some batches (EVA,
    arXiv:2410.07170). `batches` are as the model takes them. Raises UserError when each is shorter than the
    rank, or a layer's directions do not settle: PEFT would go on for ever."""
    from peft import initialize_lora_eva_weights
    from peft.tuners.lora.eva import HashHook, SVDHook

    most = max(batch["input_ids"].numel() for batch in batches)
    config = model.peft_config["default"]
    if most < (rank := max(config.r, *config.rank_pattern.values(), 0)):
        raise UserError(
            f"train.lora.init: eva takes {rank} directions (lora.rank) from one sequence's tokens, and the longest "
            f"of the first {len(batches)} has {most}: lower lora.rank, raise pack.sequence_length, or use another init"
        )
    # A head reads one row alone, unless it is adapted itself.
    kept = {} if hasattr(model.get_base_model().get_output_embeddings(), "lora_A") else {"logits_to_keep": 1}
    passes = 0

    def see(model: Any, batch: dict[str, Any]) -> None:
        nonlocal passes
        passes += 1
        model(**batch, use_cache=False, **kept)
        hooks = {name: hook for name, layer in model.named_modules() for hook in layer._forward_hooks.values()}
        unseen = {name for name, hook in hooks.items() if isinstance(hook, HashHook) and not hook.hashed_inputs}
        if passes == MOST_PASSES:
            unseen |= {name for name, hook in hooks.items() if isinstance(hook, SVDHook)}
        if unseen:
            raise UserError(
                f"train.lora.init: eva found no directions for {some(unseen)} that stay the same in {passes} passes "
                "(a layer that no token, or few tokens, go through): leave it out of train.lora.targets, or use "
                "another init"
            )

    training = model.training
    model.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "input of type .* could not be moved")  # numbers need not move
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=see,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda x, *_: (x[0] if isinstance(x, tuple) else x).flatten(0, -2),
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    model.train(training)
