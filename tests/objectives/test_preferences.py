"""Objectives over preference pairs: packed they give what the papers' formulas give, pair by pair and unpacked."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from packing.attention import implementation
from packing.collate import Bin, collate
from stages import objectives, pairs
from stages.errors import UserError
from stages.objectives import cpo, dpo, orpo, simpo
from tests.stages import tiny

PAIRS = 3


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels: a chosen and a rejected answer to each prompt, chosen first."""
    random = np.random.default_rng(3)
    made = []
    for _ in range(PAIRS):
        prompt = random.integers(3, tiny.VOCABULARY, random.integers(2, 9))
        for _ in range(2):
            answer = random.integers(3, tiny.VOCABULARY, random.integers(1, 12))
            ids = np.concatenate([prompt, answer])
            made.append((ids, np.where(np.arange(len(ids)) < len(prompt), -100, ids)))
    return made


def packed(reference: bool = True) -> dict[str, Any]:
    """All of them in two bins of a batch, with padding."""
    rows = documents()
    bins = [
        Bin(
            np.concatenate([i for i, _ in some]),
            np.concatenate([x for _, x in some]),
            np.array([len(i) for i, _ in some]),
        )
        for some in (rows[:4], rows[4:])
    ]
    batch = collate(bins, pad_to_multiple=16)
    assert batch["input_ids"].shape[1] > sum(len(i) for i, _ in rows)
    if reference:
        batch["reference"] = torch.from_numpy(np.random.default_rng(5).normal(-3, 1, batch["input_ids"].shape)).float()
    return batch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.llama(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation("cpu"))


def alone(model: Any, batch: dict[str, Any]) -> list[tuple[float, float, int]]:
    """Of each document: its answer's log-probability by the model, by the reference, and its tokens, one by one."""
    plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    found = []
    begin = 0
    for ids, labels in documents():
        logits = plain(torch.from_numpy(ids)[None]).logits[0].double().log_softmax(-1)
        answer = np.flatnonzero(labels != -100)
        own = sum(logits[at - 1, ids[at]].item() for at in answer)
        given = sum(batch["reference"][0, begin + at].item() for at in answer) if "reference" in batch else 0.0
        found.append((own, given, len(answer)))
        begin += len(ids)
    return found


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


BETA, FLIPPED = 0.3, 0.1


def by_the_paper(name: str, own: tuple[float, float], given: tuple[float, float], sizes: tuple[int, int]) -> float:
    """A pair's loss, as the papers write it."""
    c, r = own[0] - given[0], own[1] - given[1]
    d = BETA * (c - r)
    if name == "sigmoid":
        return -(1 - FLIPPED) * math.log(s(d)) - FLIPPED * math.log(s(-d))
    if name == "hinge":
        return max(0.0, 1 - d)
    if name == "ipo":
        return (c / sizes[0] - r / sizes[1] - 1 / (2 * BETA)) ** 2
    if name == "robust":
        return (-(1 - FLIPPED) * math.log(s(d)) + FLIPPED * math.log(s(-d))) / (1 - 2 * FLIPPED)
    if name == "exo_pair":
        ours, theirs = (s(d), s(-d)), (1 - FLIPPED, FLIPPED)
        return sum(p * math.log(p / q) for p, q in zip(ours, theirs, strict=True))
    if name == "nca_pair":
        return -math.log(s(BETA * c)) - math.log(s(-BETA * c)) / 2 - math.log(s(-BETA * r)) / 2
    if name == "sppo_hard":
        return (c - 1 / (2 * BETA)) ** 2 + (r + 1 / (2 * BETA)) ** 2
    if name == "apo_zero":
        return (1 - s(BETA * c)) + s(BETA * r)
    if name == "apo_down":
        return s(BETA * c) + (1 - s(d))
    if name == "discopop":
        share = s(d / 0.05)
        return (1 - share) * -math.log(s(d)) + share * math.exp(-d)
    assert name == "sft"
    return -own[0] / sizes[0]


@pytest.mark.parametrize("name", get_args(dpo.Name))
def test_dpo_losses_are_the_papers(model: Any, name: dpo.Name) -> None:
    batch = packed()
    rows = alone(model, batch)
    expected = 0.0
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        own, given, sizes = zip(chosen, rejected, strict=True)
        expected += by_the_paper(name, own, given, sizes)
    smoothed = {"label_smoothing": FLIPPED} if name in ("sigmoid", "robust", "exo_pair") else {}
    options = dpo.DpoOptions(beta=BETA, loss=name, **smoothed)
    found = dpo.loss(model, options, pairs.pick(batch))(pairs.pick(batch))
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)
    margins = [BETA * ((c[0] - c[1]) - (r[0] - r[1])) for c, r in zip(rows[::2], rows[1::2], strict=True)]
    assert found["margin"].item() == pytest.approx(sum(margins), rel=1e-4)
    assert found["accuracy"].item() == sum(margin > 0 for margin in margins)


def test_losses_add_up_with_weights(model: Any) -> None:
    batch = pairs.pick(packed())
    one, other, both = (
        dpo.loss(model, dpo.DpoOptions(loss=loss), batch)(batch)["loss"].item()
        for loss in ("sigmoid", "sft", {"sigmoid": 0.5, "sft": 2.0})
    )
    assert both == pytest.approx(0.5 * one + 2.0 * other, rel=1e-5)


@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo"])
def test_objectives_without_a_reference_are_the_papers(model: Any, name: str) -> None:
    batch = packed(reference=False)
    expected = 0.0
    rows = alone(model, batch)
    for (c, _, m), (r, _, n) in zip(rows[::2], rows[1::2], strict=True):
        if name == "orpo":
            p, q = math.exp(c / m), math.exp(r / n)
            expected += -math.log(p) - 0.1 * math.log(s(math.log(p / (1 - p)) - math.log(q / (1 - q))))
        elif name == "simpo":
            expected += -math.log(s(2.0 * c / m - 2.0 * r / n - 1.0))
        else:
            expected += -math.log(s(0.1 * (c - r))) - c / m
    of = {"orpo": orpo, "simpo": simpo, "cpo": cpo}[name]
    prepared = of.OBJECTIVE.prepare(batch)
    found = of.OBJECTIVE.loss(model, of.OBJECTIVE.options(), prepared)(prepared)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_packed_gradients_are_those_of_the_pairs_one_by_one(model: Any) -> None:
    batch = packed()
    prepared = pairs.pick(batch)
    of_batch = dpo.loss(model, dpo.DpoOptions(), prepared)
    parameters = list(model.parameters())
    together = torch.autograd.grad(of_batch(prepared)["loss"], parameters)
    apart = [torch.zeros_like(p) for p in parameters]
    begin = 0
    rows = documents()
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        size = len(first[0]) + len(second[0])
        one = collate([Bin(np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]]),
                           np.array([len(first[0]), len(second[0])]))], pad_to_multiple=1)  # fmt: skip
        one["reference"] = batch["reference"][:, begin : begin + size]
        begin += size
        for total, part in zip(apart, torch.autograd.grad(of_batch(pairs.pick(one))["loss"], parameters), strict=True):
            total += part
    for one_, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one_, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"bta": 0.1}, "did you mean beta"),
        ({"beta": -1}, "beta: .*greater than 0"),
        ({"loss": "robust"}, "label_smoothing"),
        ({"loss": "sigmid"}, "loss"),
        ({"loss": {}}, "at least one"),
    ],
)
def test_options_that_do_not_fit_are_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        objectives.options_of("dpo", given)
