"""What both sides of a training benchmark get: a random model in the shape of a known one, and chat-like documents."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from packing.plan import pack
from stages.tables import BINS, documents_schema, tokens_schema, write_table

LLAMA: dict[str, Any] = {"kind": "LlamaConfig", "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    # Llama-3.2-1B, Qwen3-4B, Llama-3.1-8B, SmolLM2-135M; and one that a CPU can try a script on.
    "1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "4b": {
        "kind": "Qwen3Config", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    },
    "8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
    "300m": {
        **LLAMA, "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "smollm2": {
        **LLAMA, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "tiny": {
        **LLAMA, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    },
}  # fmt: skip


def config(shape: str) -> Any:
    """The transformers config of a shape."""
    import transformers

    settings = dict(SHAPES[shape])
    kind = settings.pop("kind")
    return getattr(transformers, kind)(**settings, max_position_embeddings=131072, dtype="bfloat16")


def model(shape: str, device: str, **options: Any) -> Any:
    """A random model, made where it will train: nothing of 16 GB is written to a disk and read again."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config(shape), dtype=torch.bfloat16, **options)


def lengths(tokens: int, sequence: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Log-normal, median 300, cut to the sequence."""
    random = np.random.default_rng(0)
    found = np.clip(random.lognormal(np.log(300), 1.0, tokens // 200 + 8), 8, sequence).astype(np.int64)
    return found[: int(np.searchsorted(found.cumsum(), tokens)) + 1]


def documents(
    shape: str, tokens: int, sequence: int, share: float, learn: bool = False
) -> tuple[list[list[int]], list[int]]:
    """Random documents, and where each begins to train so that `share` of its tokens do. With `learn` they count, in
    steps of one to eight and with every tenth token at random, so that there is something to learn and a limit to it.
    """
    random = np.random.default_rng(1)
    sizes = lengths(tokens, sequence)
    vocabulary = SHAPES[shape]["vocab_size"] - 3
    rows = [(3 + random.integers(0, vocabulary, size)).tolist() for size in sizes]
    if learn:
        for i, size in enumerate(sizes):
            counted = random.integers(0, 2000) + np.arange(size) * random.integers(1, 9)
            noisy = np.where(random.random(size) < 0.1, random.integers(0, 2000, size), counted % 2000)
            rows[i] = (3 + noisy).tolist()
    return rows, [max(1, round(size * (1 - share))) for size in sizes]


def plan(
    folder: Path, shape: str, tokens: int, sequence: int, global_batch: int, share: float, learn: bool = False
) -> dict[str, Path]:
    """The documents as the stages tokenize and pack would leave them."""
    rows, starts = documents(shape, tokens, sequence, share, learn)
    write_table(
        folder / "tokens/chat/00000/tokens.arrow",
        tokens_schema(SHAPES[shape]["vocab_size"]),
        ({"ids": ids} for ids in rows),
    )
    write_table(
        folder / "plan/documents.arrow",
        documents_schema(1, sequence),
        (
            {"shard": 0, "row": i, "number": i, "length": len(ids), "trained": [{"start": start, "end": len(ids)}]}
            for i, (ids, start) in enumerate(zip(rows, starts, strict=True))
        ),
    )
    found = pack(np.array([len(ids) for ids in rows]), sequence, global_batch=global_batch, seed=0)
    bins = [found.documents[a:b].tolist() for a, b in itertools.pairwise(found.offsets)]
    write_table(
        folder / "plan/bins.arrow",
        BINS,
        (
            {
                "documents": numbers,
                "length": sum(len(rows[d]) for d in numbers),
                "trained": sum(len(rows[d]) - starts[d] for d in numbers),
            }
            for numbers in bins
        ),
    )
    description = {
        "sequence_length": sequence,
        "global_batch": global_batch,
        "max_documents": max(map(len, bins)),
        "shards": [{"path": "chat/00000", "source": "chat", "split": "train", "highest_token": max(map(max, rows))}],
    }
    (folder / "plan/plan.json").write_text(json.dumps(description))
    return {"tokens": folder / "tokens", "plan": folder / "plan"}


def to_nf4(model: Any) -> None:
    """Every linear layer but the head in nf4, as loading with BitsAndBytesConfig leaves it."""
    import bitsandbytes
    import torch
    from torch import nn

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            made = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            where = module.weight.device
            made.weight = bitsandbytes.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(where)
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], made)
    model.is_loaded_in_4bit = True
