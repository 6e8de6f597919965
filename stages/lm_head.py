"""The head of a causal language model: from hidden states to the losses of the tokens that train, and of no others.

    head = find(model, example)                # tried out on one document
    head.loss(batch)                           # summed, nats, float32
    head.token_losses(batch)                   # [trained]

The head is the model's widest layer (the vocabulary), and only some tokens train, so hidden states are picked first and
projected after, a chunk at a time: the logits of a whole batch never exist. What stands between hidden states and
logits differs by architecture. The known forms (a plain projection, Gemma's soft cap, Cohere's and Granite's scales)
are written here; whether one of them holds is *tried on the model itself*, and where none does the model computes its
own logits, in one piece. A plain projection goes with its loss in one (`stages.loss_head`).

Batches are those of `packing.collate` after `pick`: with `positions` and `targets` in place of `labels`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from stages import last_layer, loss_head

Batch = Mapping[str, Any]
Project = Callable[[Tensor], Tensor]
"""From rows to their logits."""

TRIED = 32
"""Positions on which the head is compared with the model's own logits."""
TOLERANCE = 0.01
"""Largest difference to the model's own logits, relative to the largest of them: room for bfloat16."""
MODEL_INPUTS = (
    *("input_ids", "position_ids", "seq_idx"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
"""What of a batch the model itself takes."""


@dataclass(frozen=True)
class Head:
    """How a model's losses are computed."""

    model: Any
    causal: Any
    """The model without its adapter's wrapping."""
    known: bool
    """Whether the decoder and `_logits` give the model's own logits."""
    shortened: bool = False
    """Whether the last layer takes which tokens the head reads (`stages.last_layer`)."""

    @property
    def plain(self) -> bool:
        """Whether the head is one matrix and nothing else: no bias, factor, bound or adapter."""
        project = self.causal.get_output_embeddings()
        return self.known and type(project) is nn.Linear and project.bias is None and _factors(self.causal) == PLAIN

    def loss(self, batch: Batch) -> Tensor:
        """The summed cross-entropy of the trained tokens."""
        if self.plain:
            return loss_head.linear_cross_entropy(*self._linear(batch))
        return self._in_chunks(batch, "sum").sum()

    def token_losses(self, batch: Batch) -> Tensor:
        """[trained] The cross-entropy of each trained token: minus the log-probability that the model gives it."""
        if self.plain:
            return loss_head.linear_token_losses(*self._linear(batch))
        return self._in_chunks(batch, "none")

    def log_probs(self, batch: Batch, ids: Tensor) -> Tensor:
        """[trained, k] The log-probabilities (float32) of the tokens `ids` [trained, k] after each trained position."""

        def part(project: Project, rows: Tensor, ids: Tensor) -> Tensor:
            logits = project(rows).float()
            return logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)

        return self._by_chunks(batch, part, ids)

    def top(self, batch: Batch, k: int, known: int | None = None) -> tuple[Tensor, Tensor]:
        """[trained, k] The likeliest tokens after each trained position, and their log-probabilities (float32): of the
        first `known` rows of the head alone, where others stand for no token."""
        rows, project = self._rows(batch)
        logits = (project(some).float()[:, :known] for some in torch.split(rows, loss_head.CHUNK // 8))
        found = [some.log_softmax(1).topk(k) for some in logits]
        return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])

    def _linear(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._hidden(batch), self.causal.get_output_embeddings().weight, batch["positions"], batch["targets"]

    def _hidden(self, batch: Batch) -> Tensor:
        kept = {last_layer.KEPT: batch[last_layer.KEPT]} if self.shortened and last_layer.KEPT in batch else {}
        hidden: Tensor = decoder(self.causal)(**model_inputs(batch), **kept, use_cache=False).last_hidden_state[0]
        return hidden

    def _in_chunks(self, batch: Batch, reduction: str) -> Tensor:
        """Losses, chunk by chunk."""

        def part(project: Project, rows: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(project(rows).float(), targets, reduction=reduction).reshape(-1)

        return self._by_chunks(batch, part, batch["targets"])

    def _by_chunks(self, batch: Batch, part: Callable[[Project, Tensor, Tensor], Tensor], wanted: Tensor) -> Tensor:
        """What `part` gives of the trained positions, chunk by chunk (`loss_head.chunks`); several compute their logits
        anew in the backward pass."""
        rows, project = self._rows(batch)
        if len(wanted) <= loss_head.CHUNK:
            return part(project, rows, wanted)
        found: list[Tensor] = [
            checkpoint(part, project, rows[some], wanted[some], use_reentrant=False)
            for some in loss_head.chunks(len(wanted))
        ]
        return torch.cat(found)

    def _rows(self, batch: Batch) -> tuple[Tensor, Project]:
        """What stands at the trained positions, and what makes logits of it."""
        if self.known:
            return self._hidden(batch)[batch["positions"]], self._logits
        kept = {"logits_to_keep": batch["positions"]}
        return self.model(**model_inputs(batch), use_cache=False, **kept).logits[0], _as_they_are

    def _logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary] of hidden states [rows, width], as the model's config describes its head."""
        scale, divisor, cap = _factors(self.causal)
        logits: Tensor = self.causal.get_output_embeddings()(hidden)
        if scale != 1.0:
            logits = logits * scale
        if divisor != 1.0:
            logits = logits / divisor
        return torch.tanh(logits / cap) * cap if cap else logits


def decoder(causal: Any) -> Any:
    """What gives the hidden states of a causal language model; None where transformers takes something else for it: the
    model itself (Llama 4), or a layer after it (ModernBERT)."""
    found = causal.get_decoder()
    return found if isinstance(found, PreTrainedModel) and found is not causal else None


def find(model: Any, example: Batch) -> Head:
    """The head of `model`, with or without a PEFT adapter. The model is run on `example` twice to find out how its head
    works: one short document will do."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    if decoder(causal) is None or not _agrees(Head(model, causal, known=True), example):
        return Head(model, causal, known=False)
    return Head(model, causal, known=True, shortened=_shortens(causal, example))


def _shortens(causal: Any, batch: Batch) -> bool:
    """Whether the last layer, given half of the tokens, gives what it gave for them."""
    if not last_layer.shorten(causal):
        return False
    body, training = decoder(causal), causal.training
    kept = torch.arange(0, batch["input_ids"].shape[1], 2, device=batch["input_ids"].device)
    causal.eval()
    try:
        with torch.no_grad():
            whole = body(**model_inputs(batch), use_cache=False).last_hidden_state[0, kept]
            part = body(**model_inputs(batch), kept=kept, use_cache=False).last_hidden_state[0, kept]
        same = bool((whole - part).abs().max() <= TOLERANCE * whole.abs().max())
    except TypeError:  # the decoder, or something in it, does not hand on what it does not know
        same = False
    finally:
        causal.train(training)
    if not same:
        last_layer.lengthen(causal)
    return same


def pick(batch: Batch, ignored: int = -100) -> dict[str, Any]:
    """Replace `labels` [1, tokens] by what the loss needs: `positions` [trained], those whose *next* token trains, and
    `targets` [trained], those next tokens; `kept`, unless nearly all train, says what the last layer computes. Done on
    the CPU, where picking by condition waits for no device."""
    labels = batch["labels"]
    assert labels.shape[0] == 1, "a packed batch is one row"
    following = labels[0, 1:]
    positions = (following != ignored).nonzero()[:, 0]
    picked = {"positions": positions, "targets": following[positions]}
    kept = last_layer.some(positions, labels.shape[1])
    if kept is not None:
        picked[last_layer.KEPT] = kept
    return {**{name: value for name, value in batch.items() if name != "labels"}, **picked}


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What of a batch the model itself takes."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


PLAIN = (1.0, 1.0, None)


def _factors(causal: Any) -> tuple[float, float, float | None]:
    """What the model's config says of its logits: they are multiplied, divided, and bounded (no bound: None)."""
    config = causal.config.get_text_config()
    scale, divisor = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
    return scale, divisor, getattr(config, "final_logit_softcapping", None)


def _as_they_are(logits: Tensor) -> Tensor:
    return logits


def _agrees(head: Head, batch: Batch) -> bool:
    """Whether decoder and head give the model's own logits at the first positions of a batch."""
    model, training = head.model, head.model.training
    model.eval()  # dropout would differ between the two
    try:
        with torch.no_grad():
            positions = torch.arange(min(batch["input_ids"].shape[1], TRIED), device=batch["input_ids"].device)
            own = model(**model_inputs(batch), use_cache=False, logits_to_keep=positions).logits[0].float()
            ours = head._logits(head._hidden(batch)[positions]).float()
    finally:
        model.train(training)
    return own.shape == ours.shape and bool((own - ours).abs().max() <= TOLERANCE * own.abs().max())
