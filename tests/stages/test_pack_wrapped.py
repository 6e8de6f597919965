"""Wrapped documents: every token of every row once a copy, the counts those of the labels read, and the plain loss."""

import json
from collections import Counter
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from flows.recipe import loads
from packing.collate import IGNORED, PackedBins
from stages import heldout, train
from stages.data_page import html
from stages.errors import UserError
from stages.identity import tree_of
from stages.marks import NO_TURN, ORIGIN_CONTENT, ORIGIN_END, ORIGIN_TEMPLATE, TRAIN_NO, TRAIN_UNSET
from stages.pack import PackConfig
from stages.runtime import Runtime
from stages.stage import Work
from stages.tables import read_table
from stages.train.data import name_rows
from tests.stages import tiny
from tests.stages.packed import Packed, row, shard, spans

Row = dict[str, Any]


def text(ids: list[int], identity: int, begin: int = 0, train: int = TRAIN_UNSET) -> Row:
    """A row of raw text: `begin` tokens that the tokenizer puts first, contents, and the token that ends it."""
    last = len(ids) - 1
    told = [
        *([(0, begin, ORIGIN_TEMPLATE, NO_TURN, "", TRAIN_UNSET)] if begin else []),
        *([(begin, last, ORIGIN_CONTENT, 0, "text", train)] if last > begin else []),
        (last, len(ids), ORIGIN_END, 0, "text", train),
    ]
    return {"ids": ids, "spans": spans(*told), "identity": identity.to_bytes(16, "big"), "extra": ""}


Sizes = list[list[tuple[int, int]]]
"""Of each shard's texts, their tokens, and how many of these the tokenizer puts first."""


def corpus(folder: Path, sizes: Sizes) -> list[list[list[int]]]:
    """Shards of texts, of the sources a and b in turn, whose tokens are all different; returns the ids."""
    numbers = count(1)
    made = [[[next(numbers) for _ in range(size)] for size, _ in of_shard] for of_shard in sizes]
    random = np.random.default_rng(0)  # identities, by which rows are held out and sampled
    for number, texts in enumerate(made):
        begins = [begin for _, begin in sizes[number]]
        drawn = [int(random.integers(0, 1 << 62)) << 64 | ids[0] for ids in texts]
        rows = [text(*each) for each in zip(texts, drawn, begins, strict=True)]
        shard(folder, f"{'ab'[number % 2]}/{number:05}", rows)
    return made


def count_labels(plan: dict[str, Any], bins: PackedBins) -> tuple[Counter[int], Counter[int], Counter[int]]:
    """How often each token is read, trains, and stands first in a sequence; the books of each sequence are checked."""
    read: Counter[int] = Counter()
    trained: Counter[int] = Counter()
    first: Counter[int] = Counter()
    for number in range(len(bins)):
        each = bins[number]
        assert each.lengths.tolist() == bins.document_lengths(number) == [len(each.ids)] == [bins.lengths[number]]
        assert len(each.ids) <= plan["sequence_length"]
        trains = each.labels != IGNORED
        assert (each.labels[trains] == each.ids[trains]).all()
        assert trains.sum() == bins.trained[number] > 0
        read.update(each.ids.tolist())
        trained.update(each.ids[trains].tolist())
        first[int(each.ids[0])] += 1
    return read, trained, first


@settings(max_examples=30, deadline=None)
@example(sizes=[[(3, 1), (62, 0), (64, 0)]], weight=1.0, held=0.0, global_batch=1, windowed=False, seed=0)
@given(
    sizes=st.lists(
        st.lists(st.tuples(st.integers(3, 300), st.integers(0, 2)), min_size=1, max_size=6), min_size=2, max_size=4
    ),
    weight=st.sampled_from([1.0, 2.0, 0.5]),
    held=st.sampled_from([0.0, 0.3]),
    global_batch=st.integers(1, 4),
    windowed=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_token_is_read_once_a_copy_and_counted_as_it_trains(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: Sizes,
    weight: float,
    held: float,
    global_batch: int,
    windowed: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("wrapped")
    made = corpus(folder / "tokens", sizes)
    config = {
        "documents": "wrapped",
        "global_batch": global_batch,
        "heldout_fraction": held,
        "window": 64 * global_batch if windowed else None,
        "seed": seed,
        "sources": {"a": {"weight": weight}},
    }
    try:
        packed = Packed(folder / "tokens", folder / "out", **config)
    except UserError as error:
        assert "no row is left to train on" in str(error)
        return
    rows = list(zip(chain(*made), (begin for _, begin in chain(*sizes)), strict=True))
    never = {token for ids, begin in rows for token in ids[: max(1, begin)]}
    for prefix, bins in (("", packed.bins), ("heldout_", packed.heldout)):
        read, trained, first = count_labels(packed.plan, bins)
        copies = [read[ids[0]] for ids, _ in rows]
        assert read == Counter({token: n for (ids, _), n in zip(rows, copies, strict=True) for token in ids if n})
        assert trained == +Counter({token: n - first[token] for token, n in read.items() if token not in never})
        assert packed.plan[f"{prefix}documents"] == sum(copies)
        assert packed.plan[f"{prefix}tokens"] == read.total()
        assert packed.plan[f"{prefix}trained_tokens"] == trained.total()
        if not prefix:
            for source in packed.report["sources"]:
                own = {
                    t
                    for number, texts in enumerate(made)
                    if "ab"[number % 2] == source["name"]
                    for ids in texts
                    for t in ids
                }
                assert source["trained_tokens"] == sum(n for token, n in trained.items() if token in own)
    for window, (low, high) in enumerate(pairwise(packed.bins.windows)):
        lengths = sorted(packed.bins.lengths[low:high].tolist(), reverse=True)
        assert set(lengths[:-1]) <= {64} or (set(lengths[:-2]) <= {64} and lengths[-2:] == [63, 2])
        shards = packed.bins.shards_of(range(low, high))
        assert {packed.bins.window_of_shard[number] for number in shards} <= {window}
    assert packed.facts["truncated"] == 0 and "overlong" not in packed.facts["dropped"]


def test_the_same_rows_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    corpus(tmp_path / "tokens", [[(150, 1), (30, 0), (90, 0)]])
    one, same, other = (
        tree_of(Packed(tmp_path / "tokens", tmp_path / f"out{number}/plan", documents="wrapped", seed=seed).output)
        for number, seed in enumerate((1, 1, 2))
    )
    assert one == same != other


def test_a_documents_pieces_are_listed_one_after_another(tmp_path: Path) -> None:
    corpus(tmp_path / "tokens", [[(150, 1), (30, 0)]])
    packed = Packed(tmp_path / "tokens", tmp_path / "out", documents="wrapped", global_batch=1)
    lines = read_table(packed.output / "documents.arrow").to_pylist()
    of_first = [line for line in lines if line["row"] == 0]
    assert [line["begin"] for line in of_first] == [0, *np.cumsum([line["length"] for line in of_first])[:-1]]
    assert sum(line["length"] for line in of_first) == 150
    assert [len(packed.bins), packed.plan["documents"], packed.plan["wrapped"]] == [3, 2, True]
    assert name_rows(packed.output, range(3)) == "a/00000 rows 101, 102", "each once"
    assert name_rows(packed.output, range(3), at_most=2) == "a/00000 rows 101, 102", "rows, not pieces"
    assert name_rows(packed.output, range(3), at_most=1).endswith(" and 1 more")
    assert "Documents are cut where a sequence is full and go on in the next one." in html(packed.report)


def test_whole_documents_have_no_pieces(tmp_path: Path) -> None:
    corpus(tmp_path / "tokens", [[(40, 1), (30, 0)]])
    packed = Packed(tmp_path / "tokens", tmp_path / "out")
    assert "begin" not in read_table(packed.output / "documents.arrow").column_names
    assert "wrapped" not in packed.plan and "cut where" not in html(packed.report)


def test_held_out_tokens_larger_than_a_sequence_are_copied_once(tmp_path: Path) -> None:
    shard(tmp_path / "tokens", "a/00000", [text(list(range(1, 40)), 1 << 64)])
    shard(tmp_path / "tokens", "b/00000", [text(list(range(100, 1100)), 2 << 64)], split="heldout")
    packed = Packed(tmp_path / "tokens", tmp_path / "out", documents="wrapped")
    copied = read_table(packed.output / "heldout_tokens.arrow")["ids"].to_pylist()
    assert list(chain(*copied)) == list(range(100, 1100))
    assert len(copied) == len(packed.heldout) == 16


@pytest.mark.parametrize(
    ("rows", "kind", "told"),
    [
        ([row(("user", 3), ("assistant", 4))], "conversation", r"b holds chats \(turns of user and assistant\)"),
        (
            [text([5, 6, 7, 8], 9, train=TRAIN_NO)],
            "conversation",
            r"b holds text that does not train \(3 tokens\)",
        ),
        ([{**row(("user", 3)), "extra": "{}"}], "prompt", r"b holds rows of kind prompt"),
        ([{**row(("text", 3)), "extra": '{"labels": [true]}'}], "stepwise", r"b holds rows of kind stepwise"),
        ([{**row(("text", 3)), "extra": ""}] * 2, "preference", r"b holds rows of kind preference"),
    ],
)
def test_what_is_no_raw_text_is_refused_with_its_source(tmp_path: Path, rows: list[Row], kind: str, told: str) -> None:
    if kind == "conversation":  # beside raw text, too
        shard(tmp_path / "tokens", "a/00000", [text([5, 6, 7], 1 << 64)])
    shard(tmp_path / "tokens", "b/00000", rows, kind=kind, count=1)
    mend = r" \(b/00000\)\. Set it to isolated, take the source out, or read it with convert\.sources\.b: {format: com"
    with pytest.raises(UserError, match=told + mend):
        Packed(tmp_path / "tokens", tmp_path / "out", documents="wrapped")


@pytest.mark.parametrize(("name", "value"), [("overlong", "truncate"), ("overlong", "error"), ("max_documents", 3)])
def test_settings_for_whole_documents_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, which is for whole documents"):
        PackConfig.model_validate({"documents": "wrapped", name: value})


RECIPE = """
name: books
fetch: {model: {path: m}, data: {books: {files: b.jsonl}, talks: {files: t.jsonl}}%s}
convert: {format: %s}
pack: {documents: wrapped}
train: {objective: %s}
"""


@pytest.mark.parametrize(
    ("fetch", "format", "objective", "told"),
    [
        (
            "",
            "messages",
            "sft",
            "`books` is read as messages, whose rows are chats: set it to isolated, take the source out",
        ),
        ("", "preference", "dpo", "dpo trains on preference: set it to isolated, or `train.objective: sft`"),
        (", teacher: {path: t}", "completion", "distillation", "the teacher of distillation reads each document whole"),
    ],
)
def test_what_the_recipe_alone_shows_is_refused_before_anything_runs(
    fetch: str, format: str, objective: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        loads(RECIPE % (fetch, format, objective), "books.yaml")
    assert loads(RECIPE % ("", "completion", "sft"), "books.yaml").recipe.pack.documents == "wrapped"


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Texts that are longer and shorter than a sequence, some of them held out, a model, and their plan."""
    folder = tmp_path_factory.mktemp("books")
    random = np.random.default_rng(0)
    for name, split, sizes in (("a", "train", (150, 9, 40, 77, 3, 31)), ("b", "heldout", (90, 20, 35))):
        who = [(1000 * len(name + split) + n) << 64 for n in sizes]
        rows = [text(random.integers(3, tiny.VOCABULARY, n).tolist(), i) for n, i in zip(sizes, who, strict=True)]
        shard(folder / "tokens", f"{name}/00000", rows, split=split)
    Packed(folder / "tokens", folder / "plan", documents="wrapped", global_batch=5, decontaminate=0)
    return {"model": tiny.llama(folder / "model"), "tokens": folder / "tokens", "plan": folder / "plan"}


def plain_losses(model: Path, bins: PackedBins) -> list[tuple[float, int]]:
    """Sum and count of each sequence's losses, by transformers over the tokens as one text."""
    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    found = []
    for number in range(len(bins)):
        each = bins[number]
        ids, labels = (torch.from_numpy(values.astype(np.int64))[None] for values in (each.ids, each.labels))
        with torch.no_grad():
            loss = network(input_ids=ids, labels=labels).loss
        found.append((float(loss) * int(bins.trained[number]), int(bins.trained[number])))
    return found


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_the_loss_is_the_plain_one_of_each_sequence_as_one_text(
    tmp_path: Path, books: dict[str, Path], micro_batch: int
) -> None:
    sums = plain_losses(books["model"], PackedBins(books["tokens"], books["plan"]))
    assert len(sums) == 5, "one step"
    config = train.TrainConfig.model_validate({"method": "full", "precision": "fp32", "max_steps": 1})
    (tmp_path / "trained").mkdir()
    work = Work(tmp_path / "work", Runtime.model_validate({"device": "cpu", "micro_batch": micro_batch}))
    train.STAGE.run(config, books, tmp_path / "trained", work)
    (line,) = (json.loads(line) for line in (tmp_path / "trained/metrics.jsonl").read_text().splitlines())
    assert line["loss"] == pytest.approx(sum(loss for loss, _ in sums) / sum(n for _, n in sums), rel=1e-5)
    assert line["trained_tokens"] == sum(n for _, n in sums)


def test_held_out_text_is_measured_as_it_would_train(tmp_path: Path, tiny_model: Path, books: dict[str, Path]) -> None:
    measured = heldout.measure(tiny_model, books["plan"], "fp32", Runtime(device="cpu"), lambda done, total: None)
    losses, counts = zip(*plain_losses(tiny_model, PackedBins(None, books["plan"])), strict=True)
    assert measured.sums == pytest.approx(losses, rel=1e-5)
    assert measured.tokens == list(counts)


def test_a_source_that_is_switched_off_may_hold_chats(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    shard(tokens, "books/00000", [text(list(range(9)), 1), text(list(range(12)), 2)])
    shard(tokens, "chats/00000", [row(("user", 3), ("assistant", 9))])
    with pytest.raises(UserError, match="chats holds chats"):
        Packed(tokens, tmp_path / "refused", documents="wrapped")
    packed = Packed(tokens, tmp_path / "out", documents="wrapped", sources={"chats": {"weight": 0}})
    assert packed.rows() == {("books/00000", 0), ("books/00000", 1)}
    assert packed.facts["dropped"] == {"not sampled": 1}
