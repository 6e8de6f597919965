"""What pack and its reader choose, where a changed line went unnoticed by all other tests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packing.collate import Bin, PackedBins, collate
from packing.plan import arrange
from stages.tables import TOP, write_table
from tests.stages.packed import Packed, row, shard
from tests.stages.test_overlap import said, tokens
from tests.stages.test_pack_pairs import pair
from tests.stages.test_pack_wrapped import corpus

ASKED = ("user", 3), ("assistant", 4)


def test_padding_stands_at_position_0() -> None:
    """A model with learned positions may have fewer of them than there is padding."""
    ids = np.arange(1, 6, dtype=np.uint16)
    batch = collate([Bin(ids, ids.astype(np.int64), np.array([3, 2]))], pad_to_multiple=64)
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, *[0] * 59]


def test_a_teachers_words_go_with_the_piece_they_are_of(tmp_path: Path) -> None:
    made = corpus(tmp_path / "tokens", [[(150, 0), (40, 0)], [(90, 0)]])
    packed = Packed(tmp_path / "tokens", tmp_path / "plan", documents="wrapped", sequence_length=64)
    for path, texts in zip(packed.bins.paths, made, strict=True):
        rows = [{"k": 1, "ids": ids, "log_probs": np.zeros(len(ids), np.float16)} for ids in texts]
        write_table(tmp_path / "reference" / path / "top.arrow", TOP, rows)
    bins = PackedBins(tmp_path / "tokens", packed.output, reference=tmp_path / "reference")
    for number in range(len(bins)):
        top = bins[number].top
        assert top is not None and top[0][:, 0].tolist() == bins[number].ids.tolist()


def test_both_answers_of_a_pair_count_as_documents_of_a_sequence(tmp_path: Path) -> None:
    rows = [{**each, "row": number} for number in range(20) for each in pair(2, 2)]
    shard(tmp_path / "tokens", "judged/00000", rows, kind="preference", count=20)
    packed = Packed(tmp_path / "tokens", tmp_path / "out", max_documents=2)
    assert {len(packed.bins[number].lengths) for number in range(len(packed.bins))} == {2}
    assert packed.plan["max_documents"] == 2


def test_a_limit_and_a_weight_draw_independently(tmp_path: Path) -> None:
    shard(tmp_path / "tokens", "chat/00000", [row(*ASKED) for _ in range(400)])
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sources={"chat": {"limit": 200, "weight": 0.5}})
    assert packed.facts["dropped"]["beyond the limit"] == 200
    assert packed.facts["documents"] == pytest.approx(100, abs=30)


def test_of_equal_rows_the_heavier_sources_stays(tmp_path: Path) -> None:
    for source in "ab":
        shard(tmp_path / "tokens", f"{source}/00000", [row(*ASKED, identity=str(n)) for n in range(5)])
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sources={"b": {"weight": 2}})
    assert packed.rows() == {("b/00000", n) for n in range(5)} and packed.facts["documents"] == 10


def test_the_seed_draws_which_shards_a_window_has(tmp_path: Path) -> None:
    for number in range(12):
        shard(tmp_path / "tokens", f"chat/{number:05}", [row(("user", 2), ("assistant", 30)) for _ in range(4)])
    of = [
        [each["window"] for each in Packed(tmp_path / "tokens", tmp_path / f"{n}", window=300, seed=n).plan["shards"]]
        for n in range(2)
    ]
    assert of[0] != of[1] and max(of[0]) == max(of[1]) > 2


@pytest.mark.parametrize("own", [{"weight": 0}, {"limit": 1}])
def test_a_source_that_is_switched_off_or_limited_takes_no_near_duplicates_from_another(
    tmp_path: Path, own: Any
) -> None:
    random = np.random.default_rng(0)
    told = [tokens(random, 50) for _ in range(5)]
    for number, source in enumerate("ab"):
        rows = [said(("user", each), ("assistant", [number])) for each in told]
        shard(tmp_path / "tokens", f"{source}/00000", rows)
    config = {"sequence_length": 256, "near_duplicates": 0.8, "train_on": "all"}
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sources={"a": own}, **config)
    assert packed.rows() == {("b/00000", n) for n in range(5)}
    assert packed.facts["dropped"] == {"near-duplicate": 5}


def test_a_held_out_row_that_is_cut_is_counted_too(tmp_path: Path) -> None:
    long = ("user", 3), ("assistant", 90)
    shard(tmp_path / "tokens", "chat/00000", [row(*ASKED), row(*long)])
    shard(tmp_path / "tokens", "probe/00000", [row(*long), row(*ASKED)], split="heldout")
    assert Packed(tmp_path / "tokens", tmp_path / "out", overlong="truncate").facts["truncated"] == 2


def test_what_few_of_very_many_questions_have_in_common_is_no_wording(tmp_path: Path) -> None:
    """Eleven questions of 1,200, less than one in a hundred, are made of a held-out one: no wording, but a leak."""
    random = np.random.default_rng(0)
    ask = tokens(random, 40)
    rows = [said(("user", tokens(random, 12)), ("assistant", [1, 2])) for _ in range(1200)]
    rows += [said(("user", [*tokens(random, 5), *ask]), ("assistant", [1, 2])) for _ in range(11)]
    shard(tmp_path / "tokens", "chat/00000", rows)
    shard(tmp_path / "tokens", "probe/00000", [said(("user", ask), ("assistant", [3]))], split="heldout")
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sequence_length=256, train_on="all")
    assert packed.facts["dropped"] == {"contaminated": 11}


def test_just_the_similarity_that_is_asked_for_is_enough(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    one = tokens(random, 50)
    shard(tmp_path / "tokens", "chat/00000", [said(("user", one), ("assistant", [n])) for n in range(2)])
    config = {"sequence_length": 256, "near_duplicates": 1.0, "train_on": "all"}
    assert Packed(tmp_path / "tokens", tmp_path / "out", **config).facts["dropped"] == {"near-duplicate": 1}


def test_what_a_tool_says_in_a_held_out_row_is_part_of_its_question(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    page = tokens(random, 40)
    shard(
        tmp_path / "tokens",
        "chat/00000",
        [said(("user", page), ("assistant", [1, 2])), said(("user", [4]), ("assistant", [5]))],
    )
    held = said(("user", [1]), ("assistant", [2]), ("tool", page), ("assistant", [3]))
    shard(tmp_path / "tokens", "probe/00000", [held], split="heldout")
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sequence_length=256, train_on="all")
    assert packed.facts["dropped"] == {"contaminated": 1} and packed.rows() == {("chat/00000", 1)}


def test_bins_that_fill_no_step_are_from_the_middle_of_the_range() -> None:
    order = arrange(np.array([9, 8, 7, 6, 5]), 4, 0, np.random.PCG64(0))
    assert order[-1] == 2
