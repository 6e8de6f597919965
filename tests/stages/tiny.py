"""Tiny models, tokens and plans for tests: random weights, and documents whose next tokens can be learned."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from packing.plan import pack
from stages.tables import BINS, SPANS, documents_schema, tokens_schema, write_table

VOCABULARY = 64
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
"""Sizes of a DeepseekV3 with a dense layer, and one of routed experts and a shared one."""
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1}
"""Sizes of an Ernie4_5_Moe of the same kind, whose router trains in float32."""


def llama(folder: Path, **changes: Any) -> Path:
    """A random two-layer Llama in a folder."""
    return save(folder, "LlamaConfig", **changes)


def save(folder: Path, config_name: str, *, dtype: str = "float32", **changes: Any) -> Path:
    """A random model of any architecture that takes Llama's names for its sizes."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    config = getattr(transformers, config_name)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def without_dtype(folder: Path) -> None:
    """Take the number type out of a model's config.json, as older ones lack it."""
    path = folder / "config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in described.items() if name != "dtype"}))


def other_weights(model: Path, folder: Path, tokens: int | None = None) -> Path:
    """A model like another, with its tokenizer and other weights; its head of so many `tokens`."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model)
    if tokens is not None:
        network.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    network.save_pretrained(folder)
    for path in (*model.glob("*token*"), *model.glob("chat_template*")):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def documents(count: int = 60, seed: int = 0) -> list[list[int]]:
    """Documents of 4 to 20 tokens that count upwards from a random start: easy to learn."""
    random = np.random.default_rng(seed)
    return [[int(3 + (s + i) % 60) for i in range(n)] for s, n in random.integers((0, 4), (60, 21), (count, 2))]


def write_tokens(folder: Path, vocabulary: int, rows: Sequence[dict[str, Any]], extra: bool = False) -> dict[str, int]:
    """One shard's `tokens.arrow` and `spans.arrow`; return what `counts.json` says of them."""
    write_table(folder / "tokens.arrow", tokens_schema(vocabulary, extra), rows)
    write_table(folder / "spans.arrow", SPANS, rows)
    ids = [each["ids"] for each in rows]
    return {"tokens": sum(map(len, ids)), "highest_token": max((max(each, default=0) for each in ids), default=0)}


def plan(
    folder: Path,
    rows: Sequence[Sequence[int]],
    *,
    sequence_length: int = 64,
    global_batch: int = 4,
    untrained: int = 2,
    packed: bool = True,
    heldout: int = 0,
) -> dict[str, Path]:
    """Tokens and plan of one shard, `chat/00000`; all but the first `untrained` tokens of a document train. Not
    `packed` is a bin a document, in the order of the rows. The last `heldout` rows are held out, a bin each."""
    tokens, plan = folder / "tokens", folder / "plan"
    write_table(
        tokens / "chat/00000/tokens.arrow",
        tokens_schema(VOCABULARY),
        ({"ids": list(ids)} for ids in rows),
    )
    documents = [
        {"shard": 0, "row": i, "number": 10 + i, "length": len(ids), "trained": [{"start": untrained, "end": len(ids)}]}
        for i, ids in enumerate(rows)
    ]
    aside, rows = rows[len(rows) - heldout :], rows[: len(rows) - heldout]
    write_table(plan / "documents.arrow", documents_schema(1, 2048), documents[: len(rows)])
    write_table(plan / "heldout_documents.arrow", documents_schema(1, 2048), documents[len(rows) :])
    write_table(plan / "heldout_tokens.arrow", tokens_schema(VOCABULARY), ({"ids": list(ids)} for ids in aside))
    write_table(
        plan / "heldout_bins.arrow",
        BINS,
        ({"documents": [i], "length": len(ids), "trained": len(ids) - untrained} for i, ids in enumerate(aside)),
    )
    found = pack(np.array([len(ids) for ids in rows]), sequence_length, global_batch=global_batch, seed=0)
    bins = [found.documents[a:b].tolist() for a, b in itertools.pairwise(found.offsets)]
    if not packed:
        bins = [[i] for i in range(len(rows))]
    write_table(
        plan / "bins.arrow",
        BINS,
        (
            {
                "documents": numbers,
                "length": sum(len(rows[d]) for d in numbers),
                "trained": sum(len(rows[d]) - untrained for d in numbers),
            }
            for numbers in bins
        ),
    )
    description = {
        "sequence_length": sequence_length,
        "global_batch": global_batch,
        "max_documents": max((len(numbers) for numbers in bins), default=0),
        "shards": [
            {"path": "chat/00000", "source": "chat", "split": "train", "highest_token": max(map(max, rows), default=0)}
        ],
    }
    (plan / "plan.json").write_text(json.dumps(description))
    return {"tokens": tokens, "plan": plan}
