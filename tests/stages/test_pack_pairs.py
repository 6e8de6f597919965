"""pack: the two answers of a preference stay together."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.stage import UserError
from tests.stages.packed import Packed, row, shard


def pair(chosen: int, rejected: int | None) -> list[dict[str, Any]]:
    """A preference row: two sequences that share a prompt and end otherwise; None for no answer."""
    first = row(("user", 3), ("assistant", chosen))
    second = row(("user", 3), *([] if rejected is None else [("assistant", rejected)]))
    other = [*second["ids"][:-1], 1000]
    return [{**first, "extra": '{"margin": 0.5}'}, {**second, "ids": other, "identity": first["identity"]}]


def test_the_two_answers_of_a_preference_are_packed_side_by_side(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pairs = [pair(*map(int, sizes)) for sizes in random.integers(1, 14, (40, 2))]
    pairs += [pair(40, 40), pair(4, None), pairs[3]]
    rows = [{**each, "row": number} for number, both in enumerate(pairs) for each in both]
    shard(tmp_path / "tokens", "judged/00000", rows, kind="preference", count=len(pairs))
    packed = Packed(tmp_path / "tokens", tmp_path / "out", sources={"judged": {"weight": 2.0}})
    assert packed.facts["dropped"] == {"duplicate": 1, "nothing to train on": 1, "overlong": 1}
    assert packed.facts["rows"] == 43 and packed.report["packed"] == 40
    assert packed.facts["documents"] == 160, "40 rows, twice, two sequences each"
    assert packed.bins.kind == "preference"
    seen = Counter[int]()
    for number in range(len(packed.bins)):
        each = packed.bins[number]
        lengths = each.lengths.reshape(-1, 2).tolist()
        for (chosen, rejected), documents in zip(lengths, each.documents.reshape(-1, 2).tolist(), strict=True):
            row_number = documents[0] // 4
            assert documents[1] == documents[0] + 1
            assert (chosen, rejected) == tuple(len(part["ids"]) for part in pairs[row_number])
            assert packed.bins.extra(documents[0]) == {"margin": 0.5} and packed.bins.extra(documents[1]) == {}
            seen[row_number] += 1
    assert seen == dict.fromkeys(range(40), 2)


def test_a_pair_is_cut_to_equal_shares(tmp_path: Path) -> None:
    both = pair(90, 20)
    shard(tmp_path / "tokens", "judged/00000", [{**each, "row": 0} for each in both], kind="preference", count=1)
    packed = Packed(tmp_path / "tokens", tmp_path / "out", overlong="truncate")
    assert packed.bins[0].lengths.tolist() == [32, 29]
    assert packed.facts["truncated"] == 1
    with pytest.raises(UserError, match="a row here is 2 documents"):
        Packed(tmp_path / "tokens", tmp_path / "other", max_documents=1)


def test_a_pair_whose_answers_are_one_once_cut_is_dropped_and_counted(tmp_path: Path) -> None:
    pairs = [pair(90, 95), pair(9, 9), pair(90, 20)]
    trimmed = pair(6, 6)
    trimmed[1]["ids"] = trimmed[0]["ids"]
    rows = [{**each, "row": number} for number, both in enumerate([*pairs, trimmed]) for each in both]
    shard(tmp_path / "tokens", "judged/00000", rows, kind="preference", count=4)
    packed = Packed(tmp_path / "tokens", tmp_path / "out", overlong="truncate")
    assert packed.facts["dropped"] == {"identical sides": 2}
    assert packed.rows() == {("judged/00000", place) for place in (2, 3, 4, 5)}
    (account,) = packed.report["sources"]
    assert account["places"] == {"identical sides": ["judged/00000, row 1", "judged/00000, row 4"]}
    shard(tmp_path / "same", "judged/00000", rows[:2], kind="preference", count=1)
    with pytest.raises(UserError, match=r"of 1, 1 identical sides\. To mend it, raise pack\.sequence_length"):
        Packed(tmp_path / "same", tmp_path / "other", overlong="truncate")


def test_sources_of_two_kinds_do_not_train_together(tmp_path: Path) -> None:
    shard(tmp_path / "tokens", "chat/00000", [row(("user", 3), ("assistant", 4))])
    shard(tmp_path / "tokens", "judged/00000", pair(3, 4), kind="preference", count=1)
    with pytest.raises(UserError, match="chat holds rows of kind conversation, judged of kind preference"):
        Packed(tmp_path / "tokens", tmp_path / "out")
