"""Rows that are like others: near-duplicates and contaminated rows, against slow readings of what they are."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contamination import find_contamination
from stages.errors import UserError
from stages.grams import hash_runs
from stages.marks import NO_TURN, ORIGIN_CONTENT, ORIGIN_TEMPLATE, TRAIN_NO, TRAIN_UNSET
from stages.near_duplicates import band_height, near_duplicates
from stages.tokenized import Files, Rows, Shard, find_shards, read_rows
from tests.stages.packed import Packed, row, shard, spans

Said = list[tuple[str, list[int]]]
"""Roles and the tokens of what they say."""


def said(*turns: tuple[str, list[int]], prompt: list[int] | None = None) -> dict[str, Any]:
    """A row with one token of template before each content; the raw text of a `prompt` before them does not train."""
    items, ids = [], list[int]()
    told = [(role, content, TRAIN_UNSET) for role, content in turns]
    for number, (role, content, train) in enumerate([*[("text", prompt, TRAIN_NO)] * (prompt is not None), *told]):
        assert content is not None
        at = len(ids)
        items += [(at, at + 1, ORIGIN_TEMPLATE, NO_TURN, "", TRAIN_UNSET)]
        items += [(at + 1, at + 1 + len(content), ORIGIN_CONTENT, number, role, train)] * bool(content)
        ids += [7, *content]
    return {**row(("user", 1)), "ids": ids, "spans": spans(*items)}


def read(folder: Path) -> tuple[Files, list[Shard], Rows]:
    shards = find_shards(folder)
    return Files(folder, folder), shards, read_rows(folder, shards, "assistant", 1 << 20, lambda *_, **__: None)


def runs(told: Said, size: int, roles: tuple[str, ...] = ("system", "user", "assistant")) -> set[tuple[int, ...]]:
    return {
        tuple(content[i : i + size]) for role, content in told if role in roles for i in range(len(content) - size + 1)
    }


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 3), max_size=60), size=st.integers(1, 9))
def test_equal_runs_have_equal_hashes_and_others_do_not(ids: list[int], size: int) -> None:
    hashes = hash_runs(np.array(ids, np.uint16), size)[: max(0, len(ids) - size + 1)].tolist()
    seen: dict[int, tuple[int, ...]] = {}
    for place, found in enumerate(hashes):
        assert seen.setdefault(found, tuple(ids[place : place + size])) == tuple(ids[place : place + size])
    assert len(seen) == len({tuple(ids[i : i + size]) for i in range(len(hashes))})


def tokens(random: np.random.Generator, size: int) -> list[int]:
    return random.integers(0, 1000, size).tolist()  # type: ignore[no-any-return]


def corpus(random: np.random.Generator, count: int) -> list[Said]:
    """Rows of which some are others with a few tokens changed."""
    rows: list[Said] = []
    for _ in range(count):
        if rows and random.random() < 0.5:
            copy = [(role, list(content)) for role, content in rows[random.integers(len(rows))]]
            for _, content in copy:
                for place in random.integers(0, len(content), random.integers(0, 3)):
                    content[place] = int(random.integers(1000))
            rows.append(copy)
        else:
            rows.append(
                [(r, random.integers(0, 1000, random.integers(20, 60)).tolist()) for r in ("user", "assistant")]
            )
    return rows


@pytest.mark.parametrize("similarity", [0.6, 0.8])
def test_near_duplicates_are_those_of_comparing_everything(tmp_path: Path, similarity: float) -> None:
    rows = corpus(np.random.default_rng(0), 300)
    for number, low in enumerate(range(0, 300, 100)):
        shard(tmp_path, f"chat/{number:05}", [said(*each) for each in rows[low : low + 100]])
    order = np.concatenate([np.arange(200, 300), np.arange(200)])
    dropped = near_duplicates(*read(tmp_path), order, similarity, np.zeros(300, np.int64))
    sets = [runs(each, 5) for each in rows]
    expected: set[int] = set()
    for position, number in enumerate(order.tolist()):
        like = [other for other in order[:position].tolist() if other not in expected]
        if any(len(sets[number] & sets[o]) >= similarity * len(sets[number] | sets[o]) for o in like):
            expected.add(number)
    for number, (other, found) in dropped.items():
        both = len(sets[number] & sets[other]) / len(sets[number] | sets[other])
        assert found == pytest.approx(both) and both >= similarity, "dropped without being similar"
        assert other not in dropped, "dropped for a row that is gone"
    missed = expected - set(dropped)
    assert len(expected) >= 50 and len(missed) <= 0.02 * len(expected)


def test_bands_are_as_high_as_recall_allows() -> None:
    assert [band_height(each) for each in (0.5, 0.8, 0.9, 1.0)] == [3, 6, 10, 32]


def test_near_duplicates_give_way_to_held_out_and_earlier_rows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    one, two = tokens(random, 50), tokens(random, 50)
    last = said(("user", [1]), ("assistant", [2]))
    first = [said(("user", one), ("assistant", two)), said(("user", two), ("assistant", two[::-1]))]
    shard(tmp_path / "tokens", "chat/00000", first)
    shard(tmp_path / "tokens", "chat/00001", [said(("user", two), ("assistant", [*two[:0:-1], 1])), last])
    shard(tmp_path / "tokens", "probe/00000", [said(("user", one), ("assistant", [*two[:-1], 3]))], split="heldout")
    config = {"sequence_length": 256, "decontaminate": 0.0, "train_on": "all"}
    packed = Packed(tmp_path / "tokens", tmp_path / "out", near_duplicates=0.8, **config)
    assert packed.facts["dropped"] == {"near-duplicate": 2}
    assert packed.rows() == {("chat/00000", 1), ("chat/00001", 1)}
    assert packed.rows(heldout=True) == {("probe/00000", 0)}
    assert packed.report["sources"][0]["places"]["near-duplicate"] == [
        "chat/00000, row 101 (like probe/00000, row 101: 98%)",
        "chat/00001, row 101 (like chat/00000, row 102: 98%)",
    ]
    assert Packed(tmp_path / "tokens", tmp_path / "all", **config).facts["dropped"] == {}


def test_a_good_and_a_bad_answer_to_one_long_question_are_no_duplicates(tmp_path: Path) -> None:
    question, answers = tokens(np.random.default_rng(0), 60), ([1, 2, 3], [4, 5, 6], [1, 2, 7])
    rows = [
        {**said(("user", question), ("assistant", answer)), "extra": json.dumps({"label": label})}
        for answer, label in zip(answers, (True, False, True), strict=True)
    ]
    shard(tmp_path / "tokens", "kto/00000", rows, kind="unpaired_preference")
    config = {"sequence_length": 256, "near_duplicates": 0.8}
    packed = Packed(tmp_path / "tokens", tmp_path / "out", **config)
    assert packed.facts["dropped"] == {"near-duplicate": 1}
    assert packed.rows() == {("kto/00000", 0), ("kto/00000", 1)} and packed.facts["labels"] == {"false": 1, "true": 1}
    shard(tmp_path / "more", "kto/00000", rows, kind="unpaired_preference")
    held = [{**said(("user", question), ("assistant", [1, 2, 8])), "extra": '{"label": false}'}]
    shard(tmp_path / "more", "probe/00000", held, split="heldout", kind="unpaired_preference")
    with pytest.raises(UserError, match=r"no row|nothing"):
        Packed(tmp_path / "more", tmp_path / "none", decontaminate=0.0, **config)


TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), st.lists(st.integers(0, 2), max_size=24)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(
    training=st.lists(TURNS, min_size=1, max_size=6),
    held=st.lists(TURNS, min_size=1, max_size=4),
    share=st.sampled_from([0.2, 0.5, 1.0]),
)
def test_contamination_is_what_looking_for_every_question_everywhere_finds(
    training: list[Said], held: list[Said], share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    shard(folder, "chat/00000", [said(*each) for each in training])
    shard(folder, "probe/00000", [said(*each) for each in held], split="heldout")
    heldout = np.arange(len(training) + len(held)) >= len(training)
    found = find_contamination(*read(folder), heldout, ~heldout, share)
    questions = [runs(each, 8, ("user",)) for each in held]
    assert found.too_short.tolist() == [n for n, question in enumerate(questions, len(training)) if not question]
    parts = [
        [len(runs(each, 8) & question) / len(question) if question else 0.0 for question in questions]
        for each in training
    ]
    enough = [
        [
            part
            for part, question in zip(each, questions, strict=True)
            if part >= share and round(part * len(question)) >= min(13, len(question))
        ]
        for each in parts
    ]
    assert {row: part for row, (_, part) in found.rows.items()} == {
        number: pytest.approx(max(each)) for number, each in enumerate(enough) if each
    }
    for number, (item, part) in found.rows.items():
        assert parts[number][item - len(training)] == pytest.approx(part)


def test_right_and_wrong_steps_to_one_long_question_are_no_duplicates(tmp_path: Path) -> None:
    question = tokens(np.random.default_rng(0), 60)
    rows = [
        {**said(("user", question), ("assistant", answer)), "extra": json.dumps({"labels": labels})}
        for answer, labels in (([1, 2, 3], [1, 1]), ([1, 2, 4], [1, 0]), ([1, 2, 5], [1, 1]))
    ]
    shard(tmp_path / "tokens", "steps/00000", rows, kind="stepwise")
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sequence_length=256, near_duplicates=0.8)
    assert packed.rows() == {("steps/00000", 0), ("steps/00000", 1)}


def test_contaminated_rows_are_dropped_counted_and_listed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    wording = tokens(random, 40)
    asks = [tokens(random, 30) for _ in range(40)]
    rows = [said(("user", wording + ask), ("assistant", [1, 2])) for ask in asks[:30]]
    rows += [
        said(("user", [5, *asks[35][3:], 6]), ("assistant", [9])),
        said(("user", [1]), ("assistant", asks[36][:21])),
    ]
    shard(tmp_path / "tokens", "chat/00000", rows)
    rows = [said(("user", wording + ask), ("assistant", [3])) for ask in asks[30:]]
    shard(tmp_path / "tokens", "probe/00000", rows, split="heldout")
    short = said(("user", [1, 2, 3]), ("assistant", [3]))
    shard(tmp_path / "tokens", "probe/00001", [short, short], split="heldout")  # the second is left out
    config = {"sequence_length": 256, "train_on": "all"}
    packed = Packed(tmp_path / "tokens", tmp_path / "out", **config)
    assert packed.facts["dropped"] == {"contaminated": 1, "duplicate": 1}, "wording that all rows share is no leak"
    assert packed.report["sources"][0]["places"]["contaminated"] == [
        "chat/00000, row 131 (like probe/00000, row 106: 67%)"
    ]
    assert packed.report["too_short"] == 1
    strict = Packed(tmp_path / "tokens", tmp_path / "strict", decontaminate=0.2, **config)
    assert strict.facts["dropped"] == {"contaminated": 2, "duplicate": 1}
    off = Packed(tmp_path / "tokens", tmp_path / "off", decontaminate=0.0, **config)
    assert off.facts["dropped"] == {"duplicate": 1}


@pytest.mark.parametrize("lost", ["overlong", "nothing to train on", "duplicate"])
def test_a_held_out_question_never_trains_whatever_becomes_of_its_row_here(tmp_path: Path, lost: str) -> None:
    """evaluate's tasks ask the rows as they were fetched."""
    random = np.random.default_rng(0)
    ask = tokens(random, 40)
    leak = said(("user", ask), ("assistant", [1, 2, 3]))
    rows = [leak, *(said(("user", tokens(random, 40)), ("assistant", [1, 2])) for _ in range(20))]
    shard(tmp_path / "tokens", "chat/00000", rows)
    held = {
        "overlong": [said(("user", ask), ("assistant", tokens(random, 300)))],
        "nothing to train on": [said(("user", ask))],
        "duplicate": [said(("user", ask), ("assistant", [4]))] * 2,
    }[lost]
    shard(tmp_path / "tokens", "probe/00000", held, split="heldout")
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sequence_length=256)
    assert packed.facts["dropped"] == {lost: 1, "contaminated": 1}
    assert packed.report["too_short"] == 0
    if lost != "overlong":  # whose answer makes it another row
        near = {"sequence_length": 256, "near_duplicates": 0.8, "decontaminate": 0.0}
        packed = Packed(tmp_path / "tokens", tmp_path / "near", **near)
        assert packed.facts["dropped"] == {lost: 1, "near-duplicate": 1}
        assert packed.rows() == {("chat/00000", n) for n in range(1, 21)}


def test_what_is_held_out_and_dropped_takes_no_row_away_that_measures(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ask, answer = tokens(random, 40), tokens(random, 200)
    shard(tmp_path / "tokens", "chat/00000", [said(("user", tokens(random, 40)), ("assistant", [1]))])
    held = [said(("user", [*ask, *answer])), said(("user", ask), ("assistant", answer))]
    shard(tmp_path / "tokens", "probe/00000", held, split="heldout")
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sequence_length=256, near_duplicates=0.8)
    assert packed.rows(heldout=True) == {("probe/00000", 1)}
    assert packed.facts["dropped"] == {"nothing to train on": 1}


def answered(kind: str, ask: list[int], random: np.random.Generator) -> dict[str, Any]:
    """One of many answers to a question, in 20 tokens or in more than the question has."""
    answer = tokens(random, 20)
    if kind == "tools":
        return said(("user", ask), ("assistant", [1, 2]), ("tool", tokens(random, 20)), ("assistant", answer))
    if kind == "goes on":
        return said(("user", ask), ("assistant", answer), ("user", tokens(random, 20)), ("assistant", [1, 2]))
    if kind == "says it again":
        return said(("user", ask), ("assistant", ask + answer))
    if kind == "text":
        return said(("text", answer * 10), prompt=ask)
    if kind == "steps":
        return said(("user", ask), ("text", answer * 10))
    return said(("user", ask), ("assistant", answer))


@pytest.mark.parametrize("held", [1, 12])
@pytest.mark.parametrize("kind", ["chat", "tools", "goes on", "says it again", "text", "steps"])
def test_many_answers_to_one_question_are_no_wording(tmp_path: Path, held: int, kind: str) -> None:
    """Twelve answers to each of twenty questions, with wording that all have in common; one question is asked of the
    held-out rows too, where it has one answer or twelve."""
    random = np.random.default_rng(0)
    wording = tokens(random, 40)
    asks = [wording + tokens(random, 60) for _ in range(20)]
    rows = [answered(kind, ask, random) for ask in asks for _ in range(12)]
    shard(tmp_path / "tokens", "chat/00000", rows)
    rows = [answered(kind, asks[7], random) for _ in range(held)]
    shard(tmp_path / "tokens", "probe/00000", rows, split="heldout")
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sequence_length=512, train_on="all")
    assert packed.facts["dropped"] == {"contaminated": 12}
    assert not any("hold out whole questions" in warning for warning in packed.report["warnings"])
    assert packed.rows() == {("chat/00000", n) for n in range(240) if n // 12 != 7}
    assert packed.report["too_short"] == 0


def test_rows_that_share_their_questions_with_many_held_out_ones_are_told_of(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    asks = [tokens(random, 60) for _ in range(20)]
    shard(tmp_path / "tokens", "chat/00000", [answered("chat", ask, random) for ask in asks for _ in range(12)])
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sequence_length=256, heldout_fraction=0.05)
    count = packed.facts["dropped"]["contaminated"]
    assert count > 24
    assert f"{count} of 240 rows are left out because they hold the question of a held-out row" in " ".join(
        packed.report["warnings"]
    )


def test_the_one_question_that_all_rows_answer_is_wording(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ask = tokens(random, 40)
    shard(
        tmp_path / "tokens", "chat/00000", [said(("user", ask), ("assistant", tokens(random, 20))) for _ in range(40)]
    )
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sequence_length=256, heldout_fraction=0.2)
    assert packed.facts["dropped"] == {}
    assert packed.report["too_short"] == packed.facts["heldout_rows"] > 0


def test_the_order_of_shards_and_batches_changes_nothing(tmp_path: Path) -> None:
    """More rows than fit into one record batch, and the same rows in shards of another size."""
    random = np.random.default_rng(0)
    rows = [said(*each) for each in corpus(random, 2500)]
    for name, size in (("one", 2500), ("many", 400)):
        for number, (low, high) in enumerate(pairwise([*range(0, 2500, size), 2500])):
            shard(tmp_path / name, f"chat/{number:05}", rows[low:high])
    same = np.zeros(2500, np.int64)
    one, many = (near_duplicates(*read(tmp_path / name), np.arange(2500), 0.8, same) for name in ("one", "many"))
    assert one == many and len(one) > 500
