"""Packed sequences read back from files, and the batches made of them."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packing.collate import IGNORED, Bin, PackedBins, collate

ROWS = [list(range(10 * i, 10 * i + 3 + i % 5)) for i in range(20)]
TRAINED = [[(0, 2)] if i % 3 else [(1, 2), (len(row) - 1, len(row))] for i, row in enumerate(ROWS)]
BINS = [[3, 0, 7], [1], [2, 4, 5, 6], [19, 8, 18], list(range(9, 18))]
BATCHES = (4, 1, 0, 5, 2)
"""Rows in each record batch, over and over: rows of one bin come from several, and no two need be of one size, for
writers end a batch when it is large."""


def write(path: Path, columns: dict[str, pa.Array]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    at, sizes = 0, itertools.cycle(BATCHES)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        while at < len(table):
            part = table.slice(at, next(sizes)).combine_chunks()
            writer.write_batch(
                pa.RecordBatch.from_arrays([pa.array(c.to_pylist(), c.type) for c in part], schema=table.schema)
            )
            at += len(part)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Rows in two shards, the second with 32-bit ids; document i is row i but for its last token."""
    shards = [("a/00000", ROWS[:12], pa.uint16()), ("b/00000", ROWS[12:], pa.uint32())]
    for path, rows, kind in shards:
        ids = pa.array([[*row, 999] for row in rows], pa.list_(kind))
        write(tmp_path / "tokens" / path / "tokens.arrow", {"ids": ids})
    numbers = range(len(ROWS))
    documents = {
        "shard": pa.array([int(i >= 12) for i in numbers], pa.uint32()),
        "row": pa.array([i if i < 12 else i - 12 for i in numbers], pa.uint32()),
        "length": pa.array([len(row) for row in ROWS], pa.uint32()),
        "trained": pa.array(
            [[{"start": a, "end": b} for a, b in ranges] for ranges in TRAINED],
            pa.list_(pa.struct([("start", pa.uint32()), ("end", pa.uint32())])),
        ),
    }
    bins = {
        "documents": pa.array(BINS, pa.list_(pa.uint32())),
        "length": pa.array([sum(len(ROWS[d]) for d in each) for each in BINS], pa.uint32()),
        "trained": pa.array([7] * len(BINS), pa.uint32()),
    }
    plan = {"sequence_length": 64, "global_batch": 2, "max_documents": 9, "shards": [{"path": s[0]} for s in shards]}
    write(tmp_path / "plan" / "documents.arrow", documents)
    write(tmp_path / "plan" / "bins.arrow", bins)
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(plan))
    return tmp_path / "tokens", tmp_path / "plan"


def test_bins_hold_their_rows_and_only_trained_tokens_have_labels(folders: tuple[Path, Path]) -> None:
    bins = PackedBins(*folders)
    assert len(bins) == len(BINS)
    for each, documents in zip((bins[i] for i in range(len(bins))), BINS, strict=True):
        assert each.lengths.tolist() == [len(ROWS[d]) for d in documents]
        assert each.ids.tolist() == [token for d in documents for token in ROWS[d]]
        expected = []
        for d in documents:
            trained = {place for a, b in TRAINED[d] for place in range(a, b)} - {0}
            expected += [token if place in trained else IGNORED for place, token in enumerate(ROWS[d])]
        assert each.labels.tolist() == expected


def test_steps_are_consecutive_bins_and_the_last_may_be_short(folders: tuple[Path, Path]) -> None:
    bins = PackedBins(*folders)
    assert [list(bins.step(i)) for i in range(bins.steps)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(IndexError):
        bins.step(3)
    with pytest.raises(IndexError):
        bins[5]


def test_bins_travel_to_a_worker_process(folders: tuple[Path, Path]) -> None:
    bins = PackedBins(*folders)
    assert pickle.loads(pickle.dumps(bins))[2].ids.tolist() == bins[2].ids.tolist()


def of(*lengths: int) -> Bin:
    ids = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    return Bin(ids, ids.astype(np.int64), np.array(lengths, np.int64))


@settings(max_examples=100, deadline=None)
@given(
    bins=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4),
    multiple=st.integers(1, 40),
    room=st.none() | st.integers(0, 6),
)
def test_a_batch_has_its_documents_side_by_side(bins: list[list[int]], multiple: int, room: int | None) -> None:
    lengths = [length for each in bins for length in each]
    documents = None if room is None else len(lengths) + room
    batch = collate([of(*each) for each in bins], pad_to_multiple=multiple, documents=documents)
    total, padded = sum(lengths), -(-sum(lengths) // multiple) * multiple
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, padded)
    assert batch["input_ids"][0, :total].tolist() == [token for each in bins for token in of(*each).ids.tolist()]
    assert batch["position_ids"][0, :total].tolist() == [place for length in lengths for place in range(length)]
    assert (batch["labels"][0, total:] == IGNORED).all()
    boundaries = batch["cu_seq_lens_q"]
    assert str(boundaries.dtype) == "torch.int32"
    assert boundaries[: len(lengths) + 1].diff().tolist() == lengths
    assert boundaries[-1] == padded
    assert boundaries.diff().min() >= 0
    assert batch["max_length_q"] >= int(boundaries.diff().max())
    if documents is not None:
        assert len(boundaries) == documents + 2


def test_shapes_stay_the_same_from_batch_to_batch() -> None:
    batches = [collate([of(*lengths)], pad_to_multiple=32, documents=6) for lengths in ((5, 4), (32,), (1,) * 6)]
    assert len({(batch["input_ids"].shape, len(batch["cu_seq_lens_q"])) for batch in batches}) == 1


def test_too_many_documents_for_a_fixed_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 documents do not fit into a batch made for 2"):
        collate([of(2, 2, 2)], pad_to_multiple=32, documents=2)
