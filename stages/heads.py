"""A small head on a language model's last hidden states, in place of the one for words: a number for a document (what
an answer is worth), or a choice of two for a step (whether it is right).

    attach(model, outputs=1)                   # trains beside the model, with or without an adapter
    of(model, batch, positions)                # [positions, outputs] float32
    save(…take(model)…, folder)                # head.safetensors; the language model is as it was
    convert(folder, folder / HEAD)             # a language model's folder becomes a classifier's, and is proven to be

What is published is transformers' own: AutoModelForSequenceClassification with one label for a document,
AutoModelForTokenClassification with two for a step.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages import lm_head
from stages.errors import UserError
from stages.reward_models import SEPARATOR, text_of

HEAD = "head.safetensors"
KINDS = ("SequenceClassification", "TokenClassification")
SCALE = 1e-3
"""Largest difference of what the head gives, relative to the largest, that reading it back may make."""
TEXTS = (
    "The capital of France is Paris.",
    "2 + 3 * 4 = 14",
    "def mean(values):\n    return sum(values) / len(values)\n",
)


def attach(model: Any, outputs: int) -> None:
    """Give a language model a new head, which trains, drawn from torch's seed. Its own rests, but for
    what it shares with the embeddings."""
    causal = _bare(model)
    width = causal.config.get_text_config().hidden_size
    embedded = {id(parameter) for parameter in causal.get_input_embeddings().parameters()}
    for parameter in causal.get_output_embeddings().parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in embedded)
    head = nn.Linear(width, outputs, bias=outputs > 1)
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5)  # arXiv:2009.01325, appendix
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    causal.score = head.to(causal.device)


def of(model: Any, batch: Mapping[str, Any], positions: Tensor) -> Tensor:
    """[positions, outputs] What the head gives at some positions of a packed batch, in float32."""
    bare = _bare(model)
    hidden = bare.base_model(**lm_head.model_inputs(batch), use_cache=False).last_hidden_state[0]
    rows, head = hidden[positions].float(), bare.score
    with torch.autocast(rows.device.type, enabled=False):
        found: Tensor = nn.functional.linear(
            rows, head.weight.float(), None if head.bias is None else head.bias.float()
        )
    return found


def has(model: Any) -> bool:
    """Whether a model has such a head."""
    return isinstance(getattr(_bare(model), "score", None), nn.Linear)


def take(model: Any) -> nn.Linear:
    """The head, taken off the model."""
    bare = _bare(model)
    head: nn.Linear = bare.score
    del bare.score
    return head


def save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a head's weights in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    wide = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(wide, folder / HEAD, metadata={"format": "pt"})


def classifier(folder: Path) -> str:
    """transformers' class for the classifier that a model's folder holds; empty when it holds none."""
    kinds = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
    found = [kind for kind in KINDS if str(kinds[0]).endswith(f"For{kind}")]
    return f"AutoModelFor{found[0]}" if found else ""


def refuse(folder: Path, outputs: int) -> None:
    """Raise UserError where transformers has no classifier for the model of a folder, of which config.json is enough,
    with the head that `attach` gives it."""
    import transformers
    from transformers import AutoConfig

    kind = _kind(outputs)
    try:
        described = AutoConfig.from_pretrained(folder, local_files_only=True, num_labels=outputs)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the model cannot be loaded for training: {error}") from error
    try:
        with torch.device("meta"):
            model = getattr(transformers, kind).from_config(described)
    except ValueError:  # as it has no such class, for which it names all those that it has
        model = None
    if model is None or not has(model) or (model.score.bias is not None) != (outputs > 1):
        raise UserError(
            f"train.objective: what it trains is published as transformers' {kind}, which for {described.model_type} "
            "models does not exist, or has another head: take a base model of another kind, such as Llama, Mistral, "
            "Phi or Qwen"
        )


def convert(folder: Path, head: Path, separator: str | None = None) -> None:
    """Turn a language model's folder into a classifier's with that head; `separator` is what closes the steps that it
    judges. The folder has the chat template already that it is to be asked through. Raises UserError where transformers
    has no such classifier for the model, or it does not give what the head gave."""
    tensors = load_file(head)
    outputs = tensors["weight"].shape[0]
    refuse(folder, outputs)
    kind = _kind(outputs)
    probes = list(_probes(folder))
    before = _loaded("AutoModelForCausalLM", folder, dtype=torch.float32)
    model = _loaded(kind, folder, dtype="auto", num_labels=outputs)
    with torch.no_grad():
        for name, parameter in model.score.named_parameters():
            parameter.copy_(tensors[name])
        before.score = nn.Linear(model.score.in_features, outputs, bias="bias" in tensors)
        before.score.load_state_dict({name: p.float() for name, p in model.score.state_dict().items()})
        wanted = [before.score(before.base_model(ids, use_cache=False).last_hidden_state[0]) for ids in probes]
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        path.unlink()  # never written over: it may be a link to another artifact's
    if outputs > 1:
        model.config.id2label, model.config.label2id = {0: "wrong", 1: "right"}, {"wrong": 0, "right": 1}
    if separator is not None:
        setattr(model.config, SEPARATOR, separator)
    described = model.config.get_text_config()
    if outputs == 1 and described.pad_token_id == _last_token(folder):
        # transformers reads a text before its padding, and would take the end of an answer for some.
        described.pad_token_id = None
    model.save_pretrained(folder)
    saved = _loaded(kind, folder, dtype=torch.float32)
    with torch.no_grad():
        found = [saved(ids, use_cache=False).logits[0] for ids in probes]
    for one, other in zip(wanted, found, strict=True):
        difference = float((one[-1] - (other[-1] if outputs > 1 else other)).abs().max())
        if not difference <= SCALE * max(1.0, float(one.abs().max())):
            raise UserError(f"merge: the saved head does not give what was trained: it is off by {difference:.3g}")


def _kind(outputs: int) -> str:
    return f"AutoModelFor{KINDS[0] if outputs == 1 else KINDS[1]}"


def _bare(model: Any) -> Any:
    """The model without its adapter's wrapping."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _last_token(folder: Path) -> int | None:
    """The token that a judged answer ends in: that of its chat template, or of a plain text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id  # type: ignore[no-any-return]
    with suppress(ValueError):  # of a template that takes no such turns
        text = text_of(tokenizer, [{"role": "user", "content": "?"}], "!")
        return int(tokenizer(text, add_special_tokens=False)["input_ids"][-1])
    return None


def _probes(folder: Path) -> Iterator[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in TEXTS:
        yield torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def _loaded(kind: str, folder: Path, **how: Any) -> Any:
    import transformers

    try:
        with _quiet():
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, **how).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"merge: the model does not load as transformers' {kind}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a head is new: it is about to be given its weights."""
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
