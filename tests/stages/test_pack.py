"""pack: what trains, what is dropped and counted, what is held out, and what comes out as files."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packing.collate import IGNORED
from stages.identity import tree_of
from stages.marks import NO_TURN, ORIGIN_CONTENT, ORIGIN_END, ORIGIN_TEMPLATE, TRAIN_NO, TRAIN_UNSET, TRAIN_YES
from stages.pack import PackConfig
from stages.stage import UserError
from stages.tables import SPANS, read_table
from stages.tokenized import may_train, read_spans, trained_ranges
from tests.stages.packed import Packed, labels, row, shard, spans

CHAT = [("system", 3), ("user", 4), ("assistant", 5), ("user", 2), ("assistant", 3)]
"""Turns begin at 0, 6, 13, 21, 26; the row has 32 tokens."""


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", [*range(15, 21), *range(28, 32)]),
        ("last", [*range(28, 32)]),
        ("all", [*range(2, 6), *range(8, 13), *range(15, 21), *range(23, 26), *range(28, 32)]),
        (["user"], [*range(8, 13), *range(23, 26)]),
        (["system", "assistant"], [*range(2, 6), *range(15, 21), *range(28, 32)]),
        ([], []),
    ],
)
def test_contents_and_ends_of_the_chosen_turns_train(tmp_path: Path, train_on: Any, expected: list[int]) -> None:
    shard(tmp_path / "tokens", "chat/00000", [row(*CHAT)])
    if not expected:
        with pytest.raises(UserError, match="1 nothing to train on"):
            Packed(tmp_path / "tokens", tmp_path / "out", train_on=train_on)
        return
    packed = Packed(tmp_path / "tokens", tmp_path / "out", train_on=train_on)
    assert list(labels(packed.bins)) == [expected]
    assert packed.facts["trained_tokens"] == len(expected) == packed.bins.trained.sum()


def test_a_turns_own_flag_goes_before_the_choice(tmp_path: Path) -> None:
    told = [("user", 4, TRAIN_YES), ("assistant", 5, TRAIN_NO), ("assistant", 2)]
    shard(tmp_path / "tokens", "chat/00000", [row(*told)])
    packed = Packed(tmp_path / "tokens", tmp_path / "out")
    assert list(labels(packed.bins)) == [[*range(2, 7), *range(17, 20)]]


@pytest.mark.parametrize("train_on", ["assistant", "all", "last"])
def test_raw_text_trains_under_every_choice_but_for_its_first_token(tmp_path: Path, train_on: str) -> None:
    text = {**row(("text", 1)), "spans": spans((0, 9, ORIGIN_CONTENT, 0, "text", TRAIN_UNSET)), "ids": list(range(9))}
    shard(tmp_path / "tokens", "books/00000", [text])
    packed = Packed(tmp_path / "tokens", tmp_path / "out", train_on=train_on)
    assert list(labels(packed.bins)) == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert packed.facts["trained_tokens"] == 8


TOLD = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.sampled_from([ORIGIN_TEMPLATE, ORIGIN_CONTENT, ORIGIN_END]),
        st.sampled_from(["", "system", "user", "assistant", "text", "tool"]),
        st.sampled_from([TRAIN_UNSET, TRAIN_NO, TRAIN_YES]),
    ),
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(TOLD, max_size=5),
    train_on=st.sampled_from(["assistant", "all", "last", ("user",), ("tool", "assistant"), ("system",)]),
    limit=st.integers(1, 30),
)
def test_trained_ranges_are_what_a_token_by_token_reading_gives(rows: list[Any], train_on: Any, limit: int) -> None:
    made, expected = [], []
    for told in rows:
        at, items, trained = 0, [], set()
        last = max((turn for turn, (_, _, role, _) in enumerate(told) if role == "assistant"), default=-1)
        for turn, (size, origin, role, flag) in enumerate(told):
            items.append((at, at + size, origin, turn if role else NO_TURN, role, flag))
            chosen = {
                "assistant": role == "assistant",
                "last": role == "assistant" and turn == last,
                "all": role != "",
            }.get(train_on, role in train_on) or role == "text"
            if origin != ORIGIN_TEMPLATE and (flag == TRAIN_YES or (flag == TRAIN_UNSET and chosen)):
                trained |= set(range(at, at + size))
            at += size
        made.append({"row": 0, "ids": [0] * at, "spans": spans(*items), "identity": bytes(16)})
        expected.append(sorted(place for place in trained if 0 < place < limit))
    found = read_spans(pa.Table.from_pylist(made, schema=SPANS))
    used = np.minimum([len(each["ids"]) for each in made], limit).astype(np.int64)
    tokens, counts, starts, ends = trained_ranges(found, may_train(found, train_on), used)
    assert tokens.tolist() == [len(each) for each in expected]
    pieces = list(zip(starts.tolist(), ends.tolist(), strict=True))
    cuts = np.cumsum([0, *counts]).tolist()
    for low, high, each in zip(cuts, cuts[1:], expected, strict=False):
        assert [place for a, b in pieces[low:high] for place in range(a, b)] == each
        assert all(a < b for a, b in pieces[low:high])
        assert all(b < a for (_, b), (a, _) in zip(pieces[low:high], pieces[low + 1 : high], strict=False)), (
            "not merged"
        )


def test_every_row_is_packed_or_counted(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    asked = ("user", 3), ("assistant", 4)
    chat = [
        row(*asked),
        row(("user", 3), ("assistant", 90)),
        row(("user", 3)),
        row(*asked, identity="twice"),
        row(*asked, identity="twice"),
        row(*asked, identity="secret"),
    ]
    shard(tokens, "chat/00000", chat, dropped={"empty": 2})
    shard(tokens, "probe/00000", [row(*asked, identity="secret"), row(*asked, identity="other")], split="heldout")
    packed = Packed(tokens, tmp_path / "out")
    assert packed.rows() == {("chat/00000", 0), ("chat/00000", 3)}
    assert packed.rows(heldout=True) == {("probe/00000", 0), ("probe/00000", 1)}
    assert packed.facts["rows"] == 10
    assert packed.facts["dropped"] == {
        "duplicate": 1,
        "empty": 2,
        "in held-out": 1,
        "nothing to train on": 1,
        "overlong": 1,
    }
    assert packed.facts["heldout_rows"] == 2
    assert [(s["name"], s["packed"], s["heldout"]) for s in packed.report["sources"]] == [
        ("chat", 2, 0),
        ("probe", 0, 2),
    ]


def test_where_convert_dropped_rows_is_told_with_their_shard(tmp_path: Path) -> None:
    def dropped(shards: Path, rows: list[Any]) -> Path:
        shard(shards, "chat/00001", rows, dropped={"not JSON": 1})
        counts = json.loads((shards / "chat/00001/counts.json").read_text())
        (shards / "chat/00001/counts.json").write_text(json.dumps({**counts, "places": {"not JSON": ["line 3"]}}))
        return shards

    packed = Packed(dropped(tmp_path / "some", [row(("user", 3), ("assistant", 4))]), tmp_path / "out")
    assert packed.report["sources"][0]["places"] == {"not JSON": ["chat/00001, line 3"]}
    with pytest.raises(UserError, match=r"of 1, convert dropped 1 not JSON \(the first: chat/00001, line 3\)$"):
        Packed(dropped(tmp_path / "none", []), tmp_path / "nothing")


ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.sampled_from([0, 3, 30, 70]), st.booleans()),
    min_size=1,
    max_size=12,
)
"""Source, identity, tokens the assistant says, and whether it answers at all; source c is held out."""


@settings(max_examples=25, deadline=None)
@given(
    told=ROWS,
    weight=st.sampled_from([0.0, 1.0, 1.5]),
    limit=st.none() | st.integers(1, 3),
    deduplicate=st.booleans(),
    fraction=st.sampled_from([0.0, 0.3]),
)
def test_each_row_has_the_fate_that_reading_the_rules_row_by_row_gives(
    told: list[Any],
    weight: float,
    limit: int | None,
    deduplicate: bool,
    fraction: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    turn = {"a": (False, limit is not None, -1.0), "b": (weight == 0, False, -weight), "c": (False, False, -1.0)}
    told = sorted(told, key=lambda each: (turn[each[0]], each[0]))  # whose of equal rows stays
    by_source: dict[str, list[dict[str, Any]]] = {"a": [], "b": [], "c": []}
    fates: list[str] = []
    made = [row(("user", 3), *[("assistant", size)] * answers, identity=str(who)) for _, who, size, answers in told]
    held = [
        source == "c"
        or (int.from_bytes(each["identity"][:8], "big") < int(fraction * 2**64) and (source == "a" or weight > 0))
        for (source, *_), each in zip(told, made, strict=True)
    ]
    secret = {each["identity"] for each, is_held in zip(made, held, strict=True) if is_held}
    seen: set[tuple[bytes, int]] = set()
    for (source, _, size, answers), each, is_held in zip(told, made, held, strict=True):
        by_source[source].append(each)
        if len(each["ids"]) > 64:
            fates.append("overlong")
        elif not answers:
            fates.append("nothing to train on")
        elif not is_held and each["identity"] in secret:
            fates.append("in held-out")
        elif deduplicate and (each["identity"], size) in seen:
            fates.append("duplicate")
        else:
            seen.add((each["identity"], size))
            fates.append("held out" if is_held else source)
    for source, rows in by_source.items():
        if rows:
            shard(folder / "tokens", f"{source}/00000", rows, split="heldout" if source == "c" else "train")
    counts = Counter(fates)
    beyond = max(0, counts["a"] - (limit or len(told)))
    config = {
        "deduplicate": deduplicate,
        "heldout_fraction": fraction,
        "sources": {"a": {"limit": limit}, "b": {"weight": weight}},
    }
    training = counts["a"] - beyond + counts["b"] * (weight > 0)
    if not training:
        with pytest.raises(UserError, match="no row is left to train on"):
            Packed(folder / "tokens", folder / "out", **config)
        return
    packed = Packed(folder / "tokens", folder / "out", **config)
    expected = {reason: counts[reason] for reason in ("overlong", "nothing to train on", "in held-out", "duplicate")}
    expected |= {"beyond the limit": beyond, "not sampled": counts["b"] * (weight == 0)}
    assert packed.facts["dropped"] == {reason: count for reason, count in expected.items() if count}
    assert packed.facts["heldout_rows"] == counts["held out"] == len(packed.rows(heldout=True))
    assert counts["a"] - beyond + int(weight) * counts["b"] <= packed.facts["documents"]
    assert packed.facts["documents"] <= counts["a"] - beyond + int(np.ceil(weight)) * counts["b"]
    assert not packed.rows() & packed.rows(heldout=True)
    read = [packed.bins[number] for number in range(len(packed.bins))]
    assert sum(len(each.lengths) for each in read) == packed.facts["documents"]
    assert all(each.lengths.sum() <= 64 and (each.labels != IGNORED).any() for each in read)


def test_rows_that_say_the_same_are_duplicates_where_the_same_trains(tmp_path: Path) -> None:
    """The same words with the question said not to train are a duplicate under `assistant` and none under `all`."""
    tokens = tmp_path / "tokens"
    asked, unasked = ("user", 3), ("user", 3, TRAIN_NO)
    first, second = ("assistant", 4), ("assistant", 4, TRAIN_NO)
    rows = [(asked, first, asked, first), (unasked, first, unasked, first)]  # as two formats have them
    rows += [(asked, first, asked, second), (asked, second, asked, first)]  # a conversation's answers, one by one
    shard(tokens, "chat/00000", [row(*each, identity="said") for each in rows])
    kept = {on: Packed(tokens, tmp_path / on, train_on=on).rows() for on in ("assistant", "all")}
    assert kept == {"assistant": {("chat/00000", n) for n in (0, 2, 3)}, "all": {("chat/00000", n) for n in range(4)}}
    shard(tokens, "probe/00000", [row(unasked, first, unasked, second, identity="said")], split="heldout")
    shard(tokens, "more/00000", [row(*rows[0], identity="other")])
    packed = Packed(tokens, tmp_path / "held")
    assert packed.facts["dropped"] == {"in held-out": 4}, "what is held out never trains, whatever of it does"


def test_duplicates_stay_when_asked_but_held_out_rows_never_train(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    asked = ("user", 3), ("assistant", 4)
    shard(tokens, "chat/00000", [row(*asked, identity=name) for name in ("twice", "twice", "secret")])
    shard(tokens, "probe/00000", [row(*asked, identity="secret")], split="heldout")
    packed = Packed(tokens, tmp_path / "out", deduplicate=False)
    assert packed.rows() == {("chat/00000", 0), ("chat/00000", 1)}
    assert packed.facts["dropped"] == {"in held-out": 1}


@pytest.mark.parametrize("own", [{"weight": 0}, {"limit": 1}])
def test_a_source_that_is_switched_off_or_limited_takes_no_rows_from_another(tmp_path: Path, own: Any) -> None:
    asked = ("user", 3), ("assistant", 4)
    for source in "ab":
        shard(tmp_path / "tokens", f"{source}/00000", [row(*asked, identity=str(n)) for n in range(5)])
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sources={"a": own})
    assert packed.rows() == {("b/00000", n) for n in range(5)}
    assert packed.facts["dropped"] == {"duplicate": 5}


def test_truncation_cuts_the_end_and_counts(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    rows = [
        row(("user", 3), ("assistant", 90)),
        row(("user", 90), ("assistant", 9)),
        row(("user", 3), ("assistant", 9)),
    ]
    shard(tokens, "chat/00000", rows)
    packed = Packed(tokens, tmp_path / "out", overlong="truncate")
    assert packed.facts["truncated"] == 1
    assert packed.facts["dropped"] == {"nothing to train on": 1}
    assert sorted(labels(packed.bins)) == [list(range(8, 18)), list(range(8, 64))]


def test_prompts_longer_than_a_sequence_are_dropped_and_counted(tmp_path: Path) -> None:
    prompts = [{**row(("user", size)), "extra": "{}"} for size in (3, 90, 5)]
    prompts.append({**prompts[0], "ids": [], "spans": []})  # raw text may be empty
    shard(tmp_path / "tokens", "asked/00000", prompts, kind="prompt")
    packed = Packed(tmp_path / "tokens", tmp_path / "out")
    assert packed.facts["dropped"] == {"nothing to train on": 1, "overlong": 1}
    assert packed.rows() == {("asked/00000", 0), ("asked/00000", 2)}
    with pytest.raises(UserError, match=r"asked/00000, row 102: 93 tokens do not fit into pack\.sequence_length 64"):
        Packed(tmp_path / "tokens", tmp_path / "other", overlong="error")


def test_overlong_rows_as_an_error_are_named(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    asked = ("user", 3), ("assistant", 4)
    shard(tokens, "a/00000", [row(*asked)])
    shard(tokens, "b/00001", [row(*asked), row(("user", 3), ("assistant", 90))])
    with pytest.raises(UserError, match=r"b/00001, row 102: 99 tokens do not fit into pack\.sequence_length 64"):
        Packed(tokens, tmp_path / "out", overlong="error")
    packed = Packed(tokens, tmp_path / "without", overlong="error", sources={"b": {"weight": 0}})
    assert packed.rows() == {("a/00000", 0)}
    assert packed.facts["dropped"] == {"overlong": 1, "not sampled": 1}
    shard(tokens, "b/00001", [row(*asked), row(("user", 3), ("assistant", 90))], split="heldout")
    with pytest.raises(UserError, match=r"b/00001, row 102"):
        Packed(tokens, tmp_path / "asked", overlong="error", sources={"b": {"weight": 0}})


@pytest.mark.parametrize(
    ("rows", "split", "told"),
    [
        ([], "train", "there are no rows to pack"),
        ([[("user", 5)]], "train", r"of 1, 1 nothing to train on\. To mend it, look at pack\.train_on \(assistant\)"),
        ([[("user", 5), ("assistant", 99)]], "train", r"1 overlong\. To mend it, raise pack\.sequence_length \(64\)"),
        (
            [[("user", 5), ("assistant", 5)]],
            "heldout",
            r"1 held out\. To mend it, give a source without split: heldout",
        ),
    ],
)
def test_nothing_to_train_on_is_an_error_with_its_mend(tmp_path: Path, rows: list[Any], split: str, told: str) -> None:
    shard(tmp_path / "tokens", "chat/00000", [row(*each) for each in rows], split=split)
    with pytest.raises(UserError, match=told):
        Packed(tmp_path / "tokens", tmp_path / "out")


def test_a_held_out_row_stays_held_out_when_data_is_added(tmp_path: Path) -> None:
    asked = ("user", 3), ("assistant", 4)
    first = [row(*asked) for _ in range(400)]
    shard(tmp_path / "one", "chat/00000", first)
    shard(tmp_path / "two", "chat/00000", first)
    shard(tmp_path / "two", "chat/00001", [row(*asked) for _ in range(400)])
    one = Packed(tmp_path / "one", tmp_path / "out1", heldout_fraction=0.1, seed=1)
    two = Packed(tmp_path / "two", tmp_path / "out2", heldout_fraction=0.1, seed=2)
    assert 20 < len(one.rows(heldout=True)) < 60
    assert one.rows(heldout=True) == {each for each in two.rows(heldout=True) if each[0] == "chat/00000"}
    assert not one.rows() & one.rows(heldout=True)


def test_a_source_can_hold_out_another_share(tmp_path: Path) -> None:
    asked = ("user", 3), ("assistant", 4)
    for name in "ab":
        shard(tmp_path / "tokens", f"{name}/00000", [row(*asked) for _ in range(100)])
    config = {"heldout_fraction": 0.9, "sources": {"a": {"heldout_fraction": 0.0}}}
    packed = Packed(tmp_path / "tokens", tmp_path / "out", **config)
    assert {path for path, _ in packed.rows(heldout=True)} == {"b/00000"}
    assert 70 < packed.facts["heldout_rows"] < 100


def test_a_limit_takes_a_sample_that_hardly_changes_when_data_is_added(tmp_path: Path) -> None:
    asked = ("user", 3), ("assistant", 4)
    first, more = ([row(*asked) for _ in range(count)] for count in (300, 30))
    for name in ("one", "two"):
        shard(tmp_path / name, "chat/00000", first[:200])
        shard(tmp_path / name, "chat/00001", first[200:])
        shard(tmp_path / name, "other/00000", [row(*asked) for _ in range(100)])
    shard(tmp_path / "two", "chat/00002", more)
    limits = {"sources": {"chat": {"limit": 100}, "other": {"limit": 100}}}
    one = Packed(tmp_path / "one", tmp_path / "out1", **limits)
    two = Packed(tmp_path / "two", tmp_path / "out2", **limits)
    assert one.facts["dropped"] == {"beyond the limit": 200} and two.facts["dropped"] == {"beyond the limit": 230}
    kept = one.rows() & two.rows()
    assert len(kept) == 200 - len([path for path, _ in two.rows() if path == "chat/00002"]) > 170
    assert 10 < len([path for path, _ in kept if path == "chat/00001"]) < 60, "not a fair sample"
    assert one.rows() != Packed(tmp_path / "one", tmp_path / "out3", seed=1, **limits).rows()


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 2.5, 3.0])
def test_a_weight_says_how_often_a_row_trains(tmp_path: Path, weight: float) -> None:
    asked = ("user", 3), ("assistant", 4)
    shard(tmp_path / "tokens", "chat/00000", [row(*asked) for _ in range(400)])
    shard(tmp_path / "tokens", "other/00000", [row(*asked) for _ in range(10)])
    shard(tmp_path / "tokens", "probe/00000", [row(*asked) for _ in range(10)], split="heldout")
    config = {"sources": {"chat": {"weight": weight}, "probe": {"weight": 3.0}}}
    packed = Packed(tmp_path / "tokens", tmp_path / "out", **config)
    table = read_table(packed.output / "documents.arrow")
    taken = Counter(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True))
    counts = [taken[0, number] for number in range(400)]
    assert set(counts) <= {int(weight), int(np.ceil(weight))}
    assert sum(counts) == pytest.approx(400 * weight, abs=35 if weight % 1 else 0)
    assert sum(taken.values()) == sum(counts) + 10 == packed.facts["documents"]
    assert packed.facts["dropped"] == ({"not sampled": counts.count(0)} if 0 in counts else {})
    assert len(packed.rows(heldout=True)) == packed.plan["heldout_documents"] == 10, "held-out rows have no weight"
    read = [packed.bins[number] for number in range(len(packed.bins))]
    assert sum(len(each.lengths) for each in read) == packed.facts["documents"]
    assert packed.facts["tokens"] == sum(len(each.ids) for each in read)
    assert packed.facts["trained_tokens"] == sum((each.labels != IGNORED).sum() for each in read)
    if weight % 1:
        other = Packed(tmp_path / "tokens", tmp_path / "other", seed=1, **config)
        assert read_table(other.output / "documents.arrow") != table, "the seed draws the rows"


def test_a_window_reads_its_own_shards_and_has_the_mix_of_the_whole(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for source, shards in (("a", 12), ("b", 6)):
        for number in range(shards):
            sizes = random.integers(1, 50, 20)
            rows = [row(("user", 2), ("assistant", int(size))) for size in sizes]
            shard(tmp_path / "tokens", f"{source}/{number:05}", rows)
    packed = Packed(tmp_path / "tokens", tmp_path / "out", window=3000, global_batch=4)
    bins = packed.bins
    assert packed.plan["windows"][0] == 0 and packed.plan["windows"][-1] == len(bins)
    assert 3 <= len(bins.windows) - 1 <= 5
    documents = read_table(packed.output / "documents.arrow")["shard"].to_pylist()
    for window, (begin, end) in enumerate(itertools.pairwise(bins.windows)):
        read = {documents[d] for number in range(begin, end) for d in bins[number].documents.tolist()}
        assert read == {shard for shard, of in enumerate(bins.window_of_shard) if of == window}
        sources = Counter(packed.plan["shards"][number]["source"] for number in read)
        assert abs(sources["a"] - 2 * sources["b"]) <= 2, "a window has another mix than the whole"
    whole = Packed(tmp_path / "tokens", tmp_path / "whole", global_batch=4)
    assert whole.bins.windows == [0, len(whole.bins)]
    assert whole.rows() == packed.rows()


def many(tokens: Path, count: int = 3000) -> None:
    random = np.random.default_rng(0)
    for number in range(2):
        sizes = random.integers(1, 50, count)
        shard(tokens, f"chat/{number:05}", [row(("user", 2), ("assistant", int(size))) for size in sizes])


def test_the_plan_is_complete_reproducible_and_says_its_steps(tmp_path: Path) -> None:
    """More rows and bins than fit into one record batch."""
    many(tmp_path / "tokens")
    packed = Packed(tmp_path / "tokens", tmp_path / "out", global_batch=7, max_documents=4)
    assert tree_of(Packed(tmp_path / "tokens", tmp_path / "again", global_batch=7, max_documents=4).output) == tree_of(
        packed.output
    )
    assert tree_of(Packed(tmp_path / "tokens", tmp_path / "other", global_batch=7, seed=1).output) != tree_of(
        packed.output
    )
    bins = packed.bins
    assert packed.plan["max_documents"] == bins.max_documents <= 4
    assert packed.facts["steps"] == bins.steps == -(-len(bins) // 7)
    read = [bins[number] for number in range(len(bins))]
    assert sum(len(each.lengths) for each in read) == packed.facts["documents"] == 6000
    assert all(len(each.ids) == length <= 64 for each, length in zip(read, bins.lengths, strict=True))
    assert all((each.labels != IGNORED).sum() == n for each, n in zip(read, bins.trained, strict=True))
    assert packed.facts["fill"] == pytest.approx(sum(len(each.ids) for each in read) / (len(read) * 64), abs=1e-4)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("sequence_length", 63), ("global_batch", 0), ("heldout_fraction", 1.0), ("train_on", "user")],
)
def test_settings_out_of_bounds_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=setting):
        PackConfig(**{setting: value})
