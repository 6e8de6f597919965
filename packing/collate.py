"""From a plan to a batch: read packed sequences out of memory-mapped token files and lay them side by side.

    bins = PackedBins(tokens, plan)
    batch = collate([bins[i] for i in bins.step(0)])
    model(**batch)

A batch is one flat row `[1, T]`, whatever the number of bins: attention is cut at document boundaries (see
`packing.attention`), so rows would only add padding.
"""

import bisect
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["IGNORED", "Bin", "PackedBins", "collate"]

IGNORED = -100
"""The label of a token that is not trained."""

CACHED_BATCHES = 1024
"""Opened record batches kept a file: views into the memory map, a few kilobytes each."""


@dataclass(frozen=True)
class Bin:
    """One packed sequence."""

    ids: NDArray[Any]
    """[tokens] uint16 or uint32."""
    labels: NDArray[np.int64]
    """[tokens] The token's own id where it is trained, else -100: unshifted, as Hugging Face models expect. The first
    token of a document is never trained, as its prediction would come from the document before."""
    lengths: NDArray[np.int64]
    """[documents] Tokens in each document that attention keeps apart: one of all tokens where the plan is wrapped."""
    documents: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Numbers in the plan of what it is made of, for `PackedBins.extra`: documents, or pieces of wrapped ones."""
    reference: NDArray[np.float32] | None = None
    """[tokens] What the model before training gives each token, where the bins were opened with it."""
    top: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    """[tokens, k] each: a teacher's likeliest tokens in the place of each token, and their log-probabilities."""
    extra: Sequence[Mapping[str, Any]] = ()
    """[documents] What the data says of each besides its text (see `PackedBins.extra`), where the kind of data has any
    use for it in a loss."""
    mismatched: "Bin | None" = None
    """As many documents: each one's prompt with another one's answer, where the reference brings them."""


JUDGED = ("preference", "unpaired_preference", "stepwise")
"""Kinds of data whose `extra` a loss may need."""


class PackedBins:
    """The packed sequences of a plan: `len(bins)` of them, `bins[i]` reads one.

    `tokens` and `plan` are the folders that the stages tokenize and pack wrote; without `tokens` they are the held-out
    sequences, whose tokens the plan has; `reference` is the folder that score wrote for these tokens. Opening reads a
    few numbers; token files are memory-mapped when first touched. Can be sent to another process.
    """

    def __init__(self, tokens: Path | None, plan: Path, reference: Path | None = None) -> None:
        self._arguments = (tokens, plan, reference)
        description = json.loads((plan / "plan.json").read_text())
        self.kind: str = description.get("kind", "conversation")
        """What rows are: conversation, preference, unpaired_preference, stepwise or prompt. A row of preference is two
        documents side by side in one bin, the chosen one and the rejected one."""
        self._wrapped: bool = description.get("wrapped", False)
        self.sequence_length: int = description["sequence_length"]
        self.global_batch: int = description["global_batch"]
        self.max_documents: int = description["max_documents"]
        """The most documents in any bin of the plan."""
        prefix = "heldout_" if tokens is None else ""
        self._documents = _Table(plan / f"{prefix}documents.arrow")
        self._bins = _Table(plan / f"{prefix}bins.arrow")
        self.lengths: NDArray[np.int64] = self._bins.column("length")
        """[bins] Tokens in each bin."""
        self.trained: NDArray[np.int64] = self._bins.column("trained")
        """[bins] Trained tokens in each bin: what a loss is normalised by, known without reading tokens."""
        self.windows: list[int] = description.get("windows", [0, len(self)]) if tokens else [0, len(self)]
        """[windows + 1] Window w is the bins from `windows[w]` up to `windows[w + 1] - 1`: all that read its shards."""
        self.window_of_shard: list[int | None] = [shard.get("window", 0) for shard in description["shards"]]
        """[shards] The window that reads each; null where none does."""
        self.paths: list[str] = [shard["path"] for shard in description["shards"]]
        """[shards] Their folders in `tokens` and `reference`."""
        self._shards = [_Table(tokens / path / "tokens.arrow") for path in self.paths] if tokens else []
        self._heldout = _Table(plan / "heldout_tokens.arrow") if tokens is None else None
        scored = [reference / path for path in self.paths] if reference else []
        taught = bool(scored) and (scored[0] / "top.arrow").exists()
        self._tops = [_Table(place / "top.arrow") for place in scored] if taught else None
        self._references = [_Table(place / "log_probs.arrow") for place in scored] if scored and not taught else None
        crossed = reference is not None and self.kind == "unpaired_preference"
        self._mismatched = [_Table(place / "mismatched.arrow") for place in scored] if crossed else None

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[type["PackedBins"], tuple[Path | None, Path, Path | None]]:
        return PackedBins, self._arguments

    @property
    def steps(self) -> int:
        """Optimizer steps in one pass over the bins."""
        return -(-len(self) // self.global_batch)

    def step(self, number: int) -> range:
        """The bins of one optimizer step, costliest first; `packing.plan.deal` shares them out to ranks."""
        if not 0 <= number < self.steps:
            raise IndexError(f"step {number} of {self.steps}")
        return range(number * self.global_batch, min((number + 1) * self.global_batch, len(self)))

    @property
    def longest(self) -> int:
        """At most so many tokens are in any document that attention keeps apart."""
        if self._wrapped or not len(self):
            return self.sequence_length
        return min(self._documents.largest("length"), self.sequence_length)

    def document_lengths(self, number: int) -> list[int]:
        """Tokens in each document that attention keeps apart in a bin, without reading them."""
        if self._wrapped:
            return [int(self.lengths[number])]
        batch, place = self._bins.locate(number)
        lengths = []
        for document in batch.lists["documents"].row(place).tolist():
            documents, row = self._documents.locate(document)
            lengths.append(int(documents.numbers["length"][row]))
        return lengths

    def __getitem__(self, number: int) -> Bin:
        if not 0 <= number < len(self):
            raise IndexError(f"bin {number} of {len(self)}")
        batch, place = self._bins.locate(number)
        documents = batch.lists["documents"].row(place).astype(np.int64)
        ids: list[NDArray[Any]] = []
        labels: list[NDArray[np.int64]] = []
        for document in documents.tolist():
            document_ids, document_labels = self._read(document)
            ids.append(document_ids)
            labels.append(document_labels)
        parts = [len(part) for part in ids]
        lengths = np.array([sum(parts)] if self._wrapped else parts, np.int64)
        reference = np.concatenate([self._log_probs(d) for d in documents.tolist()]) if self._references else None
        extra = [self.extra(document) for document in documents.tolist()] if self.kind in JUDGED else ()
        mismatched = self._read_mismatched(documents.tolist()) if self._mismatched else None
        tops = [self._top(document) for document in documents.tolist()] if self._tops else []
        top = (np.concatenate([i for i, _ in tops]), np.concatenate([p for _, p in tops])) if tops else None
        return Bin(np.concatenate(ids), np.concatenate(labels), lengths, documents, reference, top, extra, mismatched)

    def documents_in(self, numbers: Iterable[int]) -> int:
        """How many documents some bins hold."""
        places = [self._bins.locate(number) for number in numbers]
        return sum(len(batch.lists["documents"].row(place)) for batch, place in places)

    def extras_in(self, numbers: Iterable[int]) -> Iterator[tuple[dict[str, Any], int]]:
        """Of each document in some bins what the data says of it (`extra`), and how many tokens the plan has of it."""
        for number in numbers:
            batch, place = self._bins.locate(number)
            for document in batch.lists["documents"].row(place).tolist():
                yield self.extra(document), self._place(document)[2].stop

    def extra(self, document: int) -> dict[str, Any]:
        """What the data says of a document besides its text, such as a label or a margin; empty for nothing.

        Rows with steps also have `spans` [spans][end, turn, kind], which say where the steps are.
        """
        tokens, token_place = self._tokens(document)
        if "extra" not in tokens.texts:
            return {}
        found: dict[str, Any] = json.loads(tokens.texts["extra"][token_place].as_py() or "{}")
        if self.kind == "stepwise":
            spans = tokens.texts["spans"][token_place].as_py()
            found["spans"] = [[span["end"], span["turn"], span["kind"]] for span in spans]
        return found

    def shards_of(self, numbers: Iterable[int]) -> set[int]:
        """The shards that some bins read."""
        found: set[int] = set()
        for number in numbers:
            batch, place = self._bins.locate(number)
            for document in batch.lists["documents"].row(place).tolist():
                documents, row = self._documents.locate(document)
                found.add(int(documents.numbers["shard"][row]))
        return found

    def close(self) -> None:
        """Close the files of all shards: those that are read again are opened again."""
        for table in self._shards:
            table.close()

    def _place(self, document: int) -> tuple[int, int, slice]:
        """A document's shard, its row of the shard's tables, and which of the row's tokens it is."""
        batch, place = self._documents.locate(document)
        shard, row, length = (int(batch.numbers[name][place]) for name in ("shard", "row", "length"))
        begin = int(batch.numbers["begin"][place]) if self._wrapped else 0
        return shard, row, slice(begin, begin + length)

    def _log_probs(self, document: int) -> NDArray[np.float32]:
        assert self._references is not None
        shard, row, used = self._place(document)
        scored, scored_place = self._references[shard].locate(row)
        return np.asarray(scored.lists["log_probs"].row(scored_place)[used], np.float32)

    def _top(self, document: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert self._tops is not None
        shard, row, used = self._place(document)
        scored, scored_place = self._tops[shard].locate(row)
        k = int(scored.numbers["k"][scored_place])
        ids, log_probs = (scored.lists[name].row(scored_place).reshape(-1, k)[used] for name in ("ids", "log_probs"))
        return ids.astype(np.int64), log_probs.astype(np.float32)

    def _read_mismatched(self, documents: Sequence[int]) -> Bin:
        """The other answers to these documents' prompts, all of whose tokens count. They may be of rows that were too
        long for the plan, and are cut to what a sequence holds."""
        assert self._mismatched is not None
        ids: list[NDArray[Any]] = []
        labels: list[NDArray[np.int64]] = []
        log_probs: list[NDArray[Any]] = []
        for document in documents:
            batch, place = self._documents.locate(document)
            crossed, row = self._mismatched[int(batch.numbers["shard"][place])].locate(int(batch.numbers["row"][place]))
            ids.append(crossed.lists["ids"].row(row)[: self.sequence_length])
            log_probs.append(crossed.lists["log_probs"].row(row)[: self.sequence_length])
            labels.append(ids[-1].astype(np.int64))
            labels[-1][: crossed.numbers["answer"][row]] = IGNORED
        lengths = np.array([len(part) for part in ids], np.int64)
        return Bin(np.concatenate(ids), np.concatenate(labels), lengths, reference=np.concatenate(log_probs))

    def _tokens(self, document: int) -> "tuple[_Batch, int]":
        if self._heldout is not None:
            return self._heldout.locate(document)
        batch, place = self._documents.locate(document)
        return self._shards[int(batch.numbers["shard"][place])].locate(int(batch.numbers["row"][place]))

    def _read(self, document: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        batch, place = self._documents.locate(document)
        length = int(batch.numbers["length"][place])
        begin = int(batch.numbers["begin"][place]) if self._wrapped and self._heldout is None else 0
        tokens, token_place = self._tokens(document)
        ids = tokens.lists["ids"].row(token_place)[begin : begin + length]
        labels = np.full(length, IGNORED, np.int64)
        for begin, end in batch.lists["trained"].row(place).tolist():
            labels[begin:end] = ids[begin:end]
        labels[0] = IGNORED
        return ids, labels


def collate(bins: Sequence[Bin], pad_to_multiple: int = 8, documents: int | None = None) -> dict[str, Any]:
    """One flat batch of T tokens, where T is the bins' total rounded up to `pad_to_multiple`.

    Returns what a transformers model takes: `input_ids`, `labels` and `position_ids` (int64 `[1, T]`; positions start
    at 0 in every document), `cu_seq_lens_q` = `cu_seq_lens_k` (int32 `[boundaries]` on the CPU, where each document
    begins and the last ends), `max_length_q` = `max_length_k` (the longest document, rounded up to a power of two), and
    `seq_idx` (int32 `[1, T]`, each token's document), which kernels of state-space layers want.
    Bins that were opened with a reference also give `reference` (float32 `[1, T]`), or a teacher's `top_ids` and
    `top_log_probs` (`[1, T, k]`), judged ones `extra` (a list, the
    documents' without padding), and those that have other answers `mismatched`, a batch of these. No model takes them.

    Compiled models need T fixed: pass `pad_to_multiple = bins * sequence_length`. They take changing boundaries as they
    come (two graphs in all). Only CUDA graphs also need their number fixed: `documents` makes it `documents + 2`.
    Padding is one more document with label -100, and unused boundaries repeat T: empty documents, which the kernel
    still spends time on (8,192 tokens in one document on an H200, forward and backward: 6.9 ms; with 128 empty ones
    9.0 ms), so leave `documents` out otherwise.
    """
    lengths = np.concatenate([each.lengths for each in bins])
    total = int(lengths.sum())
    padding = -total % pad_to_multiple
    if padding or documents is not None:
        lengths = np.append(lengths, padding)
    if documents is not None:
        if len(lengths) > documents + 1:
            raise ValueError(f"{len(lengths) - 1} documents do not fit into a batch made for {documents}")
        lengths = np.append(lengths, np.zeros(documents + 1 - len(lengths), np.int64))
    ends = np.cumsum(lengths)
    positions = np.arange(total + padding) - np.repeat(ends - lengths, lengths)
    positions[total:] = 0  # a model with learned positions may have fewer of them than there is padding
    boundaries = torch.from_numpy(np.append(0, ends).astype(np.int32))
    longest = 1 << (int(lengths.max()) - 1).bit_length()
    references = [each.reference for each in bins if each.reference is not None]
    reference = np.concatenate([*references, np.zeros(padding, np.float32)])[None] if references else None
    more: dict[str, Any] = {} if reference is None else {"reference": torch.from_numpy(reference)}
    if tops := [each.top for each in bins if each.top is not None]:
        for name, parts in zip(("top_ids", "top_log_probs"), zip(*tops, strict=True), strict=True):
            joined = np.concatenate(parts)
            more[name] = torch.from_numpy(np.pad(joined, ((0, padding), (0, 0))))[None]
    if extra := [each for one in bins for each in one.extra]:
        more["extra"] = extra
    if mismatched := [one.mismatched for one in bins if one.mismatched is not None]:
        more["mismatched"] = collate(mismatched, pad_to_multiple)
    return {
        **more,
        "input_ids": _flat([each.ids for each in bins], padding, 0),
        "labels": _flat([each.labels for each in bins], padding, IGNORED),
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "seq_idx": torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))[None],
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _flat(parts: list[NDArray[Any]], padding: int, fill: int) -> Tensor:
    """[1, T] The parts and then the padding, as int64."""
    return torch.from_numpy(np.concatenate([*parts, np.full(padding, fill)]).astype(np.int64))[None]


class _Lists(NamedTuple):
    """A list column: row r is `values[offsets[r]:offsets[r + 1]]`; a range is a pair, so `values` may be [n, 2]."""

    offsets: NDArray[np.int32]
    values: NDArray[Any]

    def row(self, number: int) -> NDArray[Any]:
        return self.values[self.offsets[number] : self.offsets[number + 1]]


class _Batch(NamedTuple):
    """The columns of one record batch that this module reads, as NumPy arrays; texts and spans stay in Arrow."""

    numbers: dict[str, NDArray[Any]]
    lists: dict[str, _Lists]
    texts: dict[str, Any]


class _Table:
    """Rows of an Arrow file by number, a record batch at a time, whatever the sizes of its batches."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: Any = None
        self._batch = lru_cache(CACHED_BATCHES)(self._load)

    def _open(self) -> Any:
        if self._reader is None:
            self._reader = pa.ipc.open_file(pa.memory_map(str(self._path)))
            sizes = (self._reader.get_batch(number).num_rows for number in range(self._reader.num_record_batches))
            self._ends = list(itertools.accumulate(sizes))
        return self._reader

    def close(self) -> None:
        """Let go of the file; the next look opens it again."""
        self._reader = None
        self._batch.cache_clear()

    def column(self, name: str) -> NDArray[np.int64]:
        """A whole column of numbers."""
        values = self._open().read_all().column(name).to_numpy()
        return np.asarray(values, np.int64)

    def largest(self, name: str) -> int:
        """The largest number of a column, of which nothing is copied."""
        return int(pc.max(self._open().read_all().column(name)).as_py())

    def locate(self, row: int) -> tuple[_Batch, int]:
        """The batch that holds a row, and the row's place in it."""
        self._open()
        number = bisect.bisect_right(self._ends, row)
        return self._batch(number), row - (self._ends[number - 1] if number else 0)

    def _load(self, number: int) -> _Batch:
        batch = self._open().get_batch(number)
        numbers: dict[str, NDArray[Any]] = {}
        lists: dict[str, _Lists] = {}
        texts: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_integer(column.type):
                numbers[name] = column.to_numpy()
            elif name != "spans" and pa.types.is_list(column.type):
                lists[name] = _Lists(column.offsets.to_numpy(), _values(column.values))
            elif name == "spans" or pa.types.is_string(column.type):
                texts[name] = column
        return _Batch(numbers, lists, texts)


def _values(values: Any) -> NDArray[Any]:
    """A list column's values: numbers as they are, ranges as [n, 2]."""
    if pa.types.is_struct(values.type):
        return np.stack([values.field("start").to_numpy(), values.field("end").to_numpy()], axis=1)
    return np.asarray(values.to_numpy())
