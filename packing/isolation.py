"""The proof before training that packing changes nothing for this model: same documents, same losses, same gradients.

A few short random documents go through the model twice: packed into one batch, as training will see them, and one by
one through transformers' own eager attention, which knows nothing of packing. Takes seconds and no data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from torch import Tensor

from packing.collate import IGNORED, Bin, collate
from packing.rotary import plain_lengths

__all__ = ["check_isolation"]

LENGTHS = (9, 1, 14)
"""Tokens in each document: one of a single token, which has nothing to predict."""
LONGEST_WINDOW = 1024
"""A model with a sliding window up to this also gets a document that is longer than its window, and one whose rotary
positions are others beyond a length up to this (`packing.rotary`) one that is longer than that."""
FEW = {"attention_chunk_size": 4, "floor_scale": 1}
"""What Llama 4 counts by in thousands of tokens, which are too many to try, and what it counts by while it is checked.
None of the documents but the first begins at a multiple of its chunks."""
SIXTEEN_BITS = 1e-4
"""Relative precisions above this are those of 16-bit numbers."""
COMPARED = 2**24
"""Trainable numbers whose gradients are compared, at most: bounds the memory for big models."""


def check_isolation(model: Any, seed: int = 0) -> dict[str, float]:
    """Compare packed and unpacked documents on `model`, a causal language model of transformers, maybe under PEFT.

    The model keeps its weights, mode, config and attention implementation; call this on the device, in the precision
    and under the autocast of training, before compiling or sharding the model.

    Returns `documents`; `max_loss_difference`, over tokens, in nats; `max_gradient_difference`, over the gradients of
    the input embeddings and the trainable parameters, each as the norm of the difference over the norm of all;
    `leak`, the largest gradient of one document's loss by another document's embeddings, which is exactly 0 without a
    leak; and `tolerance`, the square root of the precision's epsilon (half of its digits), which bounds the
    differences (the loss's relative to the largest loss, if that is above 1).

    In 16 bits two exact kernels already differ by more than that in a trained model's gradients (SmolLM2-135M, random
    tokens: eager and the packed kernel, each on one document alone, differ by 2.9 times the gradient's norm). There the
    gradients are compared with those of the same batch in which the other documents hold other tokens: the same
    kernels at the same shapes, so that what remains of a difference is what one document does to another.

    Raises ValueError with the model's type and the reason if packing would change what the model learns.
    """
    kind = model.config.model_type
    documents = _documents(model.config, seed)
    parameters = list(_compared(model))
    with _evaluating(model), _counting_few(model), _watched(model.get_input_embeddings()) as embedded:
        try:
            packed_losses, packed_gradients, leak = _packed(model, documents, parameters, embedded)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{kind} cannot be packed: {error}") from error
        losses, gradients = _unpacked(model, documents, parameters, embedded)
        if _epsilon(model.get_input_embeddings().weight) > SIXTEEN_BITS:
            gradients = _among_others(model, documents, parameters, embedded, seed + 1)
    loss_difference = float((packed_losses - losses).abs().max())
    gradient_difference = max(
        _relative(packed_gradients[:1], gradients[:1]),
        _relative(packed_gradients[1:], gradients[1:]) if parameters else 0.0,
    )
    tolerance = _epsilon(model.get_input_embeddings().weight) ** 0.5
    figures = {
        "documents": len(documents),
        "max_loss_difference": loss_difference,
        "max_gradient_difference": gradient_difference,
        "leak": leak,
        "tolerance": tolerance,
    }
    reason = None
    if leak != 0.0:
        reason = (
            "documents in one sequence see one another, because some layers (state-space, convolution, or attention of "
            "an older kind) do not stop at document boundaries"
        )
    elif not loss_difference <= tolerance * max(1.0, float(losses.max())):
        reason = "a token's loss differs from its loss in the document alone, so positions or attention windows differ"
    elif not gradient_difference <= tolerance:
        reason = "gradients differ from those of the documents alone"
    if reason is not None:
        raise ValueError(f"{kind} cannot be packed: {reason}, with transformers {transformers.__version__} {figures}")
    return figures


def _packed(
    model: Any, documents: list[NDArray[np.int64]], parameters: list[Tensor], embedded: list[Tensor]
) -> tuple[Tensor, list[Tensor], float]:
    """The documents in one batch, padded: losses [tokens], gradients, and the leak into the last document."""
    batch = collate([_bin(documents)], pad_to_multiple=8, documents=len(documents) + 1)
    labels = batch["labels"]
    device = model.get_input_embeddings().weight.device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
    losses = _losses(model(**inputs, use_cache=False).logits, labels.to(device))
    if embedded[-1].shape[1] != labels.shape[1]:
        raise ValueError("it puts tokens of its own before those it is given, once for a whole batch")
    total = sum(map(len, documents))
    begin = total - len(documents[-1])
    of_last = torch.autograd.grad(losses[begin:total].sum(), embedded[-1], retain_graph=True)[0]
    gradients = _gradients(losses.sum(), embedded[-1], parameters)
    return losses[:total].detach(), [gradients[0][:, :total], *gradients[1:]], float(of_last[:, :begin].abs().max())


def _unpacked(
    model: Any, documents: list[NDArray[np.int64]], parameters: list[Tensor], embedded: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The documents one by one under eager attention: losses [tokens], and gradients summed over documents."""
    losses, gradients = [], []
    with _eager(model):
        for document in documents:
            ids = torch.from_numpy(document)[None].to(model.get_input_embeddings().weight.device)
            each = _losses(model(input_ids=ids, use_cache=False).logits, ids)
            losses.append(each.detach())
            gradients.append(_gradients(each.sum(), embedded[-1], parameters))
    by_embeddings, *by_parameter = zip(*gradients, strict=True)
    return torch.cat(losses), [torch.cat(by_embeddings, dim=1), *(sum(parts) for parts in by_parameter)]


def _among_others(
    model: Any, documents: list[NDArray[np.int64]], parameters: list[Tensor], embedded: list[Tensor], seed: int
) -> list[Tensor]:
    """Gradients of each document's loss in the packed batch, the other documents' tokens replaced by random ones; by
    the embeddings of that document, and by the parameters, summed over documents."""
    random = np.random.default_rng(seed)
    device = model.get_input_embeddings().weight.device
    ends = np.cumsum([len(document) for document in documents])
    by_embeddings, by_parameter = [], []
    for number, end in enumerate(ends):
        own = slice(int(end) - len(documents[number]), int(end))
        others = [random.integers(0, model.config.get_text_config().vocab_size, len(d)) for d in documents]
        others[number] = documents[number]
        batch = collate([_bin(others)], pad_to_multiple=8, documents=len(documents) + 1)
        labels = batch.pop("labels").to(device)
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        losses = _losses(model(**inputs, use_cache=False).logits, labels)
        found = _gradients(losses[own].sum(), embedded[-1], parameters)
        by_embeddings.append(found[0][:, own])
        by_parameter.append(found[1:])
    return [torch.cat(by_embeddings, dim=1), *(sum(parts) for parts in zip(*by_parameter, strict=True))]


def _documents(config: Any, seed: int) -> list[NDArray[np.int64]]:
    text = config.get_text_config()
    bounds = getattr(text, "sliding_window", None), *plain_lengths(text).values()
    lengths = (*LENGTHS, *(bound + 8 for bound in bounds if bound is not None and bound <= LONGEST_WINDOW))
    random = np.random.default_rng(seed)
    return [random.integers(0, text.vocab_size, length) for length in lengths]


def _bin(documents: list[NDArray[np.int64]]) -> Bin:
    ids = np.concatenate(documents)
    lengths = np.array([len(document) for document in documents])
    labels = ids.copy()
    labels[np.cumsum(lengths) - lengths] = IGNORED
    return Bin(ids, labels, lengths)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[T] The loss of predicting each token, in nats, float32; 0 where the token is not trained."""
    losses = F.cross_entropy(logits[0, :-1].float(), labels[0, 1:], ignore_index=IGNORED, reduction="none")
    return F.pad(losses, (1, 0))


def _gradients(loss: Tensor, embedded: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, [embedded, *parameters], materialize_grads=True)
    return [gradient.detach().float() for gradient in found]


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest norm of a difference, over the norm of all that is expected."""
    scale = torch.stack([each.norm() for each in expected]).norm()
    return float(torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).max() / scale)


def _epsilon(weight: Tensor) -> float:
    """Relative precision of the arithmetic."""
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return float(torch.finfo(dtype).eps)


def _compared(model: torch.nn.Module) -> Iterator[Tensor]:
    """Trainable parameters, in their order, that together stay within `COMPARED` numbers."""
    size = 0
    for parameter in model.parameters():
        if parameter.requires_grad and size + parameter.numel() <= COMPARED:
            size += parameter.numel()
            yield parameter


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; each module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _counting_few(model: torch.nn.Module) -> Iterator[None]:
    """With `FEW` where the model has larger numbers, on its modules or in their configs."""
    before = [
        (owner, name, value)
        for module in model.modules()
        for owner in (module, getattr(module, "config", None))
        for name in FEW
        if isinstance(value := getattr(owner, name, None), int)
    ]
    for owner, name, _ in before:
        setattr(owner, name, FEW[name])
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """With transformers' own eager attention."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


@contextmanager
def _watched(embeddings: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collects the embeddings' outputs, [1, T, hidden], as the leaves that gradients are taken for."""
    outputs: list[Tensor] = []

    def watch(module: torch.nn.Module, arguments: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1].clone()  # some models scale them in place, which a leaf does not allow

    handle = embeddings.register_forward_hook(watch)
    try:
        yield outputs
    finally:
        handle.remove()
