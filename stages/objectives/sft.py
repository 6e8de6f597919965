"""Supervised fine-tuning: the cross-entropy of the trained tokens, each given what stands before it in its document.

The head of a language model is its widest layer (the vocabulary), and only some tokens train, so hidden states are
picked first and projected after, a chunk at a time: the logits of a whole batch never exist. What stands between
hidden states and logits differs by architecture. The known forms (a plain projection, Gemma's soft cap, Cohere's and
Granite's scales) are written here; whether one of them holds is *tried on the model itself*, and where none does the
model computes its own logits, in one piece. A plain projection goes with its loss in one (`stages.loss_head`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stages.objectives import Batch, LossSum, Objective

if TYPE_CHECKING:
    import torch

Head = Callable[["torch.Tensor"], "torch.Tensor"]
"""From hidden states [rows, width] to logits [rows, vocabulary]."""

IGNORED = -100
"""The label of a token that does not train."""
TRIED = 32
"""Positions on which the head is compared with the model's own logits."""
TOLERANCE = 0.01
"""Largest difference to the model's own logits, relative to the largest of them: room for bfloat16."""


def prepare(batch: Batch) -> dict[str, Any]:
    """Replace `labels` [1, tokens] by what the loss needs: `positions` [trained], those whose *next* token trains, and
    `targets` [trained], those next tokens. Done on the CPU, where picking by condition waits for no device.
    """
    labels = batch["labels"]
    assert labels.shape[0] == 1, "a packed batch is one row"
    following = labels[0, 1:]
    positions = (following != IGNORED).nonzero()[:, 0]
    return {
        **{k: v for k, v in batch.items() if k != "labels"},
        "positions": positions,
        "targets": following[positions],
    }


def loss(model: Any, batch: Batch) -> LossSum:
    """The summed loss (nats, float32) of a prepared batch as a function, for `model` with or without a PEFT adapter.

    The model is run on `batch` twice to find out how its head works: one short document will do.
    """
    from stages import loss_head

    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    head = _known_head(causal)
    if not _agrees(model, causal, head, batch):
        return lambda batch: _own_loss(model, batch)
    decoder = causal.get_decoder()
    project = causal.get_output_embeddings()
    plain = _is_plain(causal)

    def loss_sum(batch: Batch) -> "torch.Tensor":
        hidden = decoder(**_inputs(batch), use_cache=False).last_hidden_state[0]
        if plain:
            return loss_head.linear_cross_entropy(hidden, project.weight, batch["positions"], batch["targets"])
        return _chunked(head, hidden[batch["positions"]], batch["targets"])

    return loss_sum


def _inputs(batch: Batch) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k not in ("positions", "targets")}


def _factors(causal: Any) -> tuple[float, float, float | None]:
    """What the model's config says of its logits: they are multiplied, divided, and bounded (no bound: None)."""
    config = causal.config.get_text_config()
    scale, divisor = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
    return scale, divisor, getattr(config, "final_logit_softcapping", None)


def _is_plain(causal: Any) -> bool:
    """Whether the head is one matrix and nothing else: no bias, factor, bound or adapter."""
    from torch import nn

    project = causal.get_output_embeddings()
    return type(project) is nn.Linear and project.bias is None and _factors(causal) == (1.0, 1.0, None)


def _known_head(causal: Any) -> Head:
    """The head that the model's config describes."""
    import torch

    project = causal.get_output_embeddings()
    scale, divisor, cap = _factors(causal)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = project(hidden)
        if scale != 1.0:
            logits = logits * scale
        if divisor != 1.0:
            logits = logits / divisor
        return torch.tanh(logits / cap) * cap if cap else logits

    return head


def _agrees(model: Any, causal: Any, head: Head, batch: Batch) -> bool:
    """Whether decoder and `head` give the model's own logits at the first positions of a batch."""
    import torch

    training = model.training
    model.eval()  # dropout would differ between the two
    try:
        with torch.no_grad():
            positions = torch.arange(min(batch["input_ids"].shape[1], TRIED), device=batch["input_ids"].device)
            own = model(**_inputs(batch), use_cache=False, logits_to_keep=positions).logits[0].float()
            ours = head(causal.get_decoder()(**_inputs(batch), use_cache=False).last_hidden_state[0][positions]).float()
    finally:
        model.train(training)
    return own.shape == ours.shape and bool((own - ours).abs().max() <= TOLERANCE * own.abs().max())


def _own_loss(model: Any, batch: Batch) -> "torch.Tensor":
    logits = model(**_inputs(batch), use_cache=False, logits_to_keep=batch["positions"]).logits[0]
    return _chunked(lambda rows: rows, logits, batch["targets"])


def _chunked(head: Head, rows: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    """Sum of cross-entropies, `loss_head.CHUNK` rows at a time; several chunks compute their logits anew in the
    backward pass."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from stages import loss_head

    def part(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(rows).float(), targets, reduction="sum")

    if len(targets) <= loss_head.CHUNK:
        return part(rows, targets)
    chunks = zip(torch.split(rows, loss_head.CHUNK), torch.split(targets, loss_head.CHUNK), strict=True)
    sums = [checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum()


OBJECTIVE = Objective(version=1, prepare=prepare, loss=loss)
