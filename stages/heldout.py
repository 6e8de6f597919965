"""Held-out rows: what a model makes of those that the plan kept aside, a packed sequence at a time.

The sequences are those of training. Of conversations it is the loss, which may be laid beside training's. Of judged
answers it is the loss of the good ones, and whether the model tells them from the bad ones, by their log-probability a
token; a long answer has no less of that because it is long. A reward model tells them by its reward, and a process
reward model tells right steps from wrong ones, for which the language model before training is taken to say always the
more common of the two.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stages.compare import PREFERENCES
from stages.generation import FROM_FOLDER, Precision, load
from stages.harness import Sample
from stages.runtime import Runtime
from stages.tables import read_table


@dataclass(frozen=True)
class Heldout:
    """What was measured."""

    sums: list[float]
    """[sequences] Loss in nats, summed over the trained tokens of each; of judged answers, those of the good ones."""
    tokens: list[int]
    """[sequences] How many tokens those are."""
    margins: list[float] = field(default_factory=list)
    """[pairs] Log-probability a token of the chosen answer, minus that of the rejected one."""
    samples: list[Sample] = field(default_factory=list)
    """Items: pairs, with 1 where the chosen answer has more log-probability a token; or good answers, with the share of
    the bad ones (of any prompt) that have less."""
    groups: list[int] = field(default_factory=list)
    """[items] Which prompt a pair, or which solution a step, belongs to: what is said to one, or in one, varies
    together."""
    behind: list[float] = field(default_factory=list)
    """[bad answers] The share of the good ones (of any prompt) that have more, where the items are good ones."""


def measure(
    weights: Path,
    plan: Path,
    precision: Precision,
    runtime: Runtime,
    measured: Callable[[int, int], None],
) -> Heldout:
    """Measure a model's folder; empty when the plan holds nothing out that says what is to be learned.

    `measured` hears how many sequences are done, and of how many.
    """
    nothing = Heldout([], [])
    if len(read_table(plan / "heldout_bins.arrow")) == 0:
        return nothing
    from packing.collate import PackedBins

    bins = PackedBins(None, plan)
    of_kind = {"conversation": _losses, "preference": _pairs, "unpaired_preference": _singles, "stepwise": _steps}
    if bins.kind not in of_kind:
        return nothing
    model = load(weights, precision, runtime.device, packed=True)
    return of_kind[bins.kind](model, bins, measured)


def same_tokens(weights: Path, tokenizer: Path, plan: Path) -> bool:
    """Whether the ids of the held-out rows, which `tokenizer` made, are the same tokens to the model in `weights`. To
    another model's they are other text, or none: its loss would be worse than anything it ever read."""
    from transformers import AutoTokenizer

    from packing.collate import PackedBins

    bins = PackedBins(None, plan)
    ids = sorted({token for number in range(len(bins)) for token in bins[number].ids.tolist()})
    own, made = (AutoTokenizer.from_pretrained(folder, **FROM_FOLDER) for folder in (weights, tokenizer))
    if ids and ids[-1] >= len(own):
        return False
    return bool(own.convert_ids_to_tokens(ids) == made.convert_ids_to_tokens(ids))


def _losses(model: Any, bins: Any, measured: Callable[[int, int], None]) -> Heldout:
    """Loss of the trained tokens, as `sft` has it."""
    from stages import lm_head

    sums = [float(head.loss(batch)) for _, head, batch in _batches(model, bins, lm_head.pick, measured)]
    return Heldout(sums, [int(n) for n in bins.trained])


def _pairs(model: Any, bins: Any, measured: Callable[[int, int], None]) -> Heldout:
    """Pairs side by side: `stages.pairs`, or a reward for each answer."""
    from stages import heads, pairs
    from stages.objectives import reward

    found = Heldout([], [])
    scored = heads.has(model.network)
    prompts: dict[bytes, int] = {}
    for packed, head, batch in _batches(model, bins, reward.prepare if scored else pairs.pick, measured):
        if scored:
            values = heads.of(model.network, batch, batch["ends"])[:, 0]
            margins = (values[0::2] - values[1::2]).tolist()
        else:
            answers = pairs.answers(head, batch)
            margins = (answers.chosen_mean - answers.rejected_mean).tolist()
            found.sums.append(-float(answers.chosen.sum()))
            found.tokens.append(int(answers.chosen_tokens.sum()))
        told = list(_told(model, packed))
        for margin, (question, chosen, prompt), (_, rejected, _) in zip(margins, told[::2], told[1::2], strict=True):
            right = margin > 0
            answer = chosen if right else rejected
            # Without a prompt, a pair is known by its answer.
            found.groups.append(prompts.setdefault(prompt or chosen.encode(), len(prompts)))
            found.samples.append(_sample(found, question, chosen, answer, "preference_accuracy", float(right)))
            if not scored:  # of which margins have another unit
                found.margins.append(margin)
    return found


def _steps(model: Any, bins: Any, measured: Callable[[int, int], None]) -> Heldout:
    """Steps of solutions, each right or wrong."""
    from stages import heads, steps
    from stages.objectives import process_reward

    found = Heldout([], [])
    scored = heads.has(model.network)
    told: list[tuple[str, bool, bool]] = []
    documents = 0
    for packed, _, batch in _batches(model, bins, process_reward.prepare, measured):
        said = heads.of(model.network, batch, batch["ends"]).argmax(1).tolist() if scored else []
        right = batch["right"].tolist()
        texts = []
        for (question, answer, _), extra, length in zip(
            _told(model, packed), packed.extra, packed.lengths.tolist(), strict=True
        ):
            count = len(steps.judged(extra, length))
            texts += [f"{question}\n{answer}"] * count
            found.groups.extend([documents] * count)
            documents += 1
        for text, label, choice in zip(texts, right, said or right, strict=True):
            told.append((text, bool(label), bool(choice)))
    common = 2 * sum(label for _, label, _ in told) >= len(told)
    words = {True: "right", False: "wrong"}
    for text, label, choice in told:
        says = choice if scored else common
        found.samples.append(_sample(found, text, words[label], words[says], "step_accuracy", float(says == label)))
    return found


def _singles(model: Any, bins: Any, measured: Callable[[int, int], None]) -> Heldout:
    """Good and bad answers: how often a good one is ahead of a bad one, which is the area under the ROC curve."""
    from stages import pairs

    found = Heldout([], [])
    answers: list[tuple[float, str, str]] = []
    bad: list[float] = []
    for packed, head, batch in _batches(model, bins, pairs.pick, measured):
        log_probs, counts = pairs.sums(-head.token_losses(batch), batch), batch["answer_tokens"]
        found.sums.append(0.0)
        found.tokens.append(0)
        rows = zip(log_probs.tolist(), counts.tolist(), _told(model, packed), packed.extra, strict=True)
        for log_prob, count, (question, answer, _), extra in rows:
            if not extra["label"]:
                bad.append(log_prob / count)
                continue
            answers.append((log_prob / count, question, answer))
            found.sums[-1] -= log_prob
            found.tokens[-1] += count
    good = sorted(mean for mean, _, _ in answers)
    found.behind.extend(1 - _share_behind(each, good) for each in bad if good)
    bad.sort()
    for mean, question, answer in answers if bad else ():
        ahead = _share_behind(mean, bad)
        found.samples.append(_sample(found, question, answer, answer, "good_over_bad", ahead))
    some = [place for place, count in enumerate(found.tokens) if count]
    return replace(found, sums=[found.sums[i] for i in some], tokens=[found.tokens[i] for i in some])


def _share_behind(value: float, others: list[float]) -> float:
    """Of `others`, in order, the share below a value; those that equal it count half."""
    return (bisect_left(others, value) + bisect_right(others, value)) / 2 / len(others)


def _sample(found: Heldout, question: str, target: str, answer: str, metric: str, score: float) -> Sample:
    return Sample(PREFERENCES, len(found.samples), question, target, answer, metric, score)


def _batches(
    model: Any, bins: Any, pick: Callable[[Any], dict[str, Any]], measured: Callable[[int, int], None]
) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Each bin, the model's head, and the bin's batch on the model's device."""
    import torch

    from packing.collate import collate
    from stages import heads, lm_head

    network, head = model.network, None
    scored = heads.has(network)
    with torch.inference_mode():
        for number in range(len(bins)):
            packed = bins[number]
            ready = pick(collate([packed]))
            batch = {n: v.to(network.device) if isinstance(v, torch.Tensor) else v for n, v in ready.items()}
            head = head or (None if scored else lm_head.find(network, batch))
            yield packed, head, batch
            measured(number + 1, len(bins))


def _told(model: Any, packed: Any) -> Iterator[tuple[str, str, bytes]]:
    """Of each document: the text before what trains, and what trains; and the tokens before it."""
    begin = 0
    for length in packed.lengths.tolist():
        ids, labels = packed.ids[begin : begin + length], packed.labels[begin : begin + length]
        begin += length
        first = int((labels >= 0).argmax())
        texts = (ids[:first].tolist(), ids[labels >= 0].tolist())
        question, answer = (model.tokenizer.decode(each, skip_special_tokens=True).strip() for each in texts)
        yield question, answer, ids[:first].tobytes()
