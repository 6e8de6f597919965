"""What makes a step faster and leaves its result alone, up to rounding: fused LoRA layers, grouped experts, fp8,
torch.compile.

hold(model, config)             # before the pre-flight check: the dtype that training computes in
compile_layers(model)           # after it: one graph for all decoder layers of a kind
"""

from contextlib import AbstractContextManager
from typing import Any

import torch

from stages.last_layer import KEPT
from stages.train import TrainConfig, adamw, float8, lora_attention, lora_experts, lora_linear, lora_mlp
from stages.train.adamw import is_split
from stages.train.optimizers import can_split
from stages.train.recomputing import layers
from stages.train.sharding import gathered_dtype

__all__ = ["autocast", "compile_layers", "hold", "marked", "splits", "wants_compiling"]

COMPILING_PAYS = 4_000_000
"""Tokens a run must train on for compilation, about a minute, to pay."""
PADDING = 16
"""Tokens of a micro-batch are a multiple of this, which products in 8 bits need."""
GRAPHS = 64
"""Graphs of one piece of code: one for every kind of layer, and for static and changing numbers of documents."""


def autocast(model: Any, config: TrainConfig, device: str) -> AbstractContextManager[Any]:
    """The context of forward passes: casting float32 weights where they are not split."""
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype, enabled=config.precision != "fp32" and not is_split(model))


def splits(config: TrainConfig, shard: str) -> bool:
    """Whether trained weights are halves of float32 ones: while they are trained, or, with `shard: fsdp`, until they
    are cut over ranks, which gather them in 16 bits."""
    return can_split(config) if shard == "none" else shard == "fsdp" and config.precision == "bf16"


def hold(model: Any, config: TrainConfig, shard: str = "none") -> dict[str, int]:
    """Bring the trained weights into the dtype that training holds them in, and have layers compute the fast way.
    Returns what was done, for the record. Weights that DeepSpeed cuts over ranks stay as they are."""
    done: dict[str, int] = {}
    sharded, split = shard != "none", splits(config, shard)
    wide = sharded and split and not gathered_dtype(model, config.precision)
    if wide:
        # Loaded in 16 bits, which nobody could know before; but what a rank keeps and gathers of it is float32.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    elif split:
        adamw.split(model, adamw.held_wide(model))
    # What ranks gather in float32 does not compute in 16 bits; on one rank adapters in float32 are narrowed for a pass.
    fuses = split and not wide if sharded else config.precision in ("bf16", "fp8")
    if config.method == "lora" and fuses:
        done["fused_adapters"] = lora_linear.quicken(model)
        if config.precision != "fp8":
            done["fused_feed_forwards"] = lora_mlp.quicken(model)
            done["fused_attentions"] = lora_attention.quicken(model)
    if config.method == "lora" and not sharded:
        done["grouped_experts"] = lora_experts.quicken(model)
    if config.precision == "fp8" and not sharded:
        done["float8_layers"] = float8.convert(layers(model))
    return done


def wants_compiling(wanted: str, device: str, tokens: int) -> bool:
    """Whether to compile, from the runtime's `compile`: auto is on a GPU, when there are tokens enough."""
    if wanted == "auto":
        return device == "cuda" and tokens >= COMPILING_PAYS
    return wanted == "always"


def compile_layers(model: Any) -> int:
    """Compile every decoder layer, in place: equal ones share a graph. Batches should then all have the same number of
    tokens; the number of documents may change. Returns how many."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    found = layers(model)
    for layer in found:  # not the hooks around it, by which a sharded layer is gathered
        layer.forward = torch.compile(layer.forward)
    return len(found)


def marked(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch; the compiler is told beforehand which of its sizes change."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", KEPT):
        if name in batch:
            torch._dynamo.maybe_mark_dynamic(batch[name], 0)
    return batch
