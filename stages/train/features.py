"""What energy-based fine-tuning rewards: continuations whose features, by the model before training, match those of the
reference answer. See `stages.objectives.ebft`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from stages.errors import UserError
from stages.generation import Device, load_network
from stages.objectives.ebft import EbftOptions

DEPTHS = (0.25, 0.5, 0.75)
"""How far up the layers features are read."""
REST = "rest"
"""Where a row has the tokens with which its reference goes on."""
AT_ONCE = 16
"""Texts that are read at once: the hidden states of all layers are held for them."""
SMALLEST = 1e-5
"""Directions of a group that are this much smaller than its largest are rounding, and left as nothing."""

Tokens = list[int]


def anchored(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, options: EbftOptions, positions: float
) -> tuple[list[dict[str, Any]], int]:
    """Every prompt with every beginning of its reference, as prompts with the tokens that come next, in `REST`; and how
    many were left out, because as a text they would be other tokens or are too long for the model's `positions`.

    Raises UserError at a row without a reference, and if nothing is left.
    """
    made, left_out = [], 0
    for row in rows:
        columns = json.loads(row["columns"])
        reference = columns.get(options.reference)
        if not isinstance(reference, str) or not reference:
            raise UserError(
                f"train.objective_options.reference: expected a text in the column {options.reference!r}, which is "
                f"{reference!r} for the prompt {row['prompt'][:200]!r}; it has {', '.join(columns) or 'no columns'}"
            )
        begin = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(reference)["input_ids"], tokenizer.eos_token_id]
        for at in range(0, len(answer), options.stride):
            ids = begin + answer[:at]
            text = tokenizer.decode(ids)
            rest = answer[at : at + options.max_new_tokens]
            if len(ids) + options.max_new_tokens > positions or tokenizer(text)["input_ids"] != ids:
                left_out += 1
                continue
            made.append({"prompt": text, "columns": json.dumps({**columns, REST: rest})})
    if not made:
        raise UserError("train: no prompt with the beginning of its reference fits into the model's positions")
    return made, left_out


class Matching:
    """The reward, as TRL's trainers call one: with all continuations of a batch, those of one place side by side.

    `keep` takes the prompts, the continuations and their rewards.
    """

    __name__ = "features"

    def __init__(
        self,
        frozen: "Frozen",
        tokenizer: Any,
        options: EbftOptions,
        keep: Callable[[Sequence[str], Sequence[str], list[float]], None],
    ) -> None:
        self.frozen, self.tokenizer, self.options, self.keep = frozen, tokenizer, options, keep

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[Tokens],
        columns: list[str],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        group = self.options.group_size
        begins: list[Tokens] = self.tokenizer(text=prompts)["input_ids"]
        rests: list[Tokens] = [json.loads(row)[REST] for row in columns]
        texts = [begin + written for begin, written in zip(begins, completion_ids, strict=True)]
        references = [begins[i] + rests[i] for i in range(0, len(prompts), group)]
        found = self.frozen.features(texts + references)
        written, wanted = found[: len(texts)].reshape(-1, group, found.shape[1]), found[len(texts) :]
        log_metric("feature_loss", float(feature_loss(written, wanted)))
        rewards = matching(written, wanted, self.options.diversity, self.options.whiten).flatten().tolist()
        self.keep(prompts, completions, rewards)
        return rewards


class Frozen:
    """The model before training, which reads texts: under its adapter where it has one, else a copy."""

    def __init__(self, trained: Any, folder: Path, device: str) -> None:
        self.trained = trained
        self.copy: Any = None
        if not isinstance(trained, PeftModel):
            half = trained.dtype == torch.bfloat16
            where: Device = "cuda" if device == "cuda" else "cpu"
            self.copy = load_network(folder, "bf16" if half else "fp32", where, packed=False)
            self.copy.requires_grad_(False)

    @torch.no_grad()
    def features(self, texts: Sequence[Tokens]) -> Tensor:
        """[texts, depths * width], float32: hidden states at each text's last token."""
        model = self.trained if self.copy is None else self.copy
        layers = [int(depth * model.config.get_text_config().num_hidden_layers) for depth in DEPTHS]
        found = []
        with _resting(model), model.disable_adapter() if self.copy is None else nullcontext():
            for start in range(0, len(texts), AT_ONCE):
                some = texts[start : start + AT_ONCE]
                last = torch.tensor([len(text) - 1 for text in some])
                ids = torch.zeros(len(some), int(last.max()) + 1, dtype=torch.long)
                for row, text in zip(ids, some, strict=True):
                    row[: len(text)] = torch.tensor(text)
                mask = torch.arange(ids.shape[1]) <= last[:, None]
                given = {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}
                states = model(**given, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
                found.append(torch.cat([states[layer][range(len(some)), last].float() for layer in layers], dim=1))
        return torch.cat(found)


def matching(written: Tensor, wanted: Tensor, diversity: float, whiten: bool) -> Tensor:
    """Rewards [places, group] of features `written` [places, group, width], with those that are `wanted`
    [places, width]."""
    group = written.shape[1]
    if whiten:
        u, s, _ = torch.linalg.svd(written, full_matrices=False)
        inverse = torch.where(s > SMALLEST * s.amax(1, keepdim=True), 1 / s, 0)
        whitening = (u * inverse[:, None]) @ u.mT
        written, copies = whitening @ written, whitening.sum(2, keepdim=True) * wanted[:, None]
    else:
        written, copies = F.normalize(written, dim=2), wanted[:, None].expand_as(written)
    alike = written @ written.mT
    others = (alike.sum(2) - alike.diagonal(dim1=1, dim2=2)) / (group - 1)
    return 2 * F.cosine_similarity(written, copies, dim=2) - 2 * diversity * others


def feature_loss(written: Tensor, wanted: Tensor) -> Tensor:
    """What all of this makes smaller: the squared distance of a place's mean features from those that are wanted, each
    of length 1, averaged over places."""
    return (F.normalize(written, dim=2).mean(1) - F.normalize(wanted, dim=1)).square().sum(1).mean()


@contextmanager
def _resting(model: Any) -> Iterator[None]:
    """Without dropout while the block runs."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
