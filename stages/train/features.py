"""What energy-based fine-tuning rewards: continuations whose features, by the model before training, match those of the
reference answer. See `stages.objectives.ebft`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from stages.errors import UserError
from stages.generation import Device, load_network
from stages.objectives.ebft import EbftOptions

DEPTHS = (0.25, 0.5, 0.75)
"""How far up the layers features are read."""
AT_ONCE = 16
"""Texts that are read at once: the hidden states of all layers are held for them."""
SMALLEST = 1e-5
"""Directions of a group that are this much smaller than its largest are rounding, and left as nothing."""

Tokens = list[int]


def anchored(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, options: EbftOptions, positions: float, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """Every prompt with every beginning of its reference, as prompts with the tokens that come next, in `rest`; and how
    many were left out, because as a text they would be other tokens or are too long for the model's `positions`. In an
    order drawn by `seed`, or a step would hold the places of one text alone.

    Raises UserError at a row without a reference or with a control token in it, and if nothing is left.
    """
    control = control_tokens(tokenizer)
    made, left_out = [], 0
    for row in rows:
        columns = json.loads(row["columns"])
        reference = columns.get(options.reference)
        if not isinstance(reference, str) or not reference:
            raise UserError(
                f"train.objective_options.reference: expected a text in the column {options.reference!r}, which is "
                f"{reference!r} for the prompt {row['prompt'][:200]!r}; it has {', '.join(columns) or 'no columns'}"
            )
        begin, answer = tokenizer([row["prompt"], reference])["input_ids"]
        if control.intersection(answer):
            raise UserError(
                "train: a reference holds the text of a control token, which would be read as one: "
                f"{reference[:300]!r}. Take such rows out with a filter"
            )
        places = range(0, len(answer), options.stride)
        ids = [begin + answer[:at] for at in places]
        texts = tokenizer.batch_decode(ids)
        for at, tokens, text, again in zip(places, ids, texts, tokenizer(texts)["input_ids"], strict=True):
            if len(tokens) + options.max_new_tokens > positions or again != tokens:
                left_out += 1
                continue
            rest = answer[at : at + options.max_new_tokens]
            made.append({"prompt": text, "columns": row["columns"], "rest": rest})
    if not made:
        raise UserError("train: no prompt with the beginning of its reference fits into the model's positions")
    return [made[i] for i in np.random.default_rng(seed).permutation(len(made))], left_out


def control_tokens(tokenizer: Any) -> frozenset[int]:
    """Those that end a turn, among others."""
    return frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)


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
        self.control = control_tokens(tokenizer)

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[Tokens],
        rest: list[Tokens],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        group = self.options.group_size
        begins: list[Tokens] = self.tokenizer(text=prompts)["input_ids"]
        texts = [self._read(begin, written) for begin, written in zip(begins, completion_ids, strict=True)]
        references = [begins[i] + rest[i] for i in range(0, len(prompts), group)]
        found = self.frozen.features(texts + references)
        written, wanted = found[: len(texts)].reshape(-1, group, found.shape[1]), found[len(texts) :]
        log_metric("feature_loss", float(feature_loss(written, wanted)))
        rewards = matching(written, wanted, self.options.diversity, self.options.whiten).flatten().tolist()
        self.keep(prompts, completions, rewards)
        return rewards

    def _read(self, begin: Tokens, written: Tokens) -> Tokens:
        """A text as it is read: an end of turn looks much the same after whatever was said, so the features are of what
        came before it."""
        return begin + [token for token in written if token not in self.control]


class Frozen:
    """The model before training, which reads texts: under its adapter where it has one, else a copy of all weights."""

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
        """[texts, depths * width], float32: hidden states at each text's last token.

        Equal texts are read once: beside others they would differ by rounding, which whitening makes a difference of.
        """
        places = {text: place for place, text in enumerate(dict.fromkeys(map(tuple, texts)))}
        return self._read(list(places))[[places[tuple(text)] for text in texts]]

    def _read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        model = self.trained if self.copy is None else self.copy
        layers = [max(1, int(depth * model.config.get_text_config().num_hidden_layers)) for depth in DEPTHS]
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
