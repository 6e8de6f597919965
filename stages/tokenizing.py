"""The work of tokenize: one shard's conversations become token ids, a record batch at a time.

Apart from `stages.tokenize`, so that `regrow plan` loads neither Arrow nor NumPy.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.encoding import Encoder, Spans, Unwritable, carry, encode, load
from stages.fast_encoding import Positions, agrees
from stages.marks import ORIGIN_CONTENT, ROLES
from stages.runtime import all_cores
from stages.stage import Facts, UserError, Work
from stages.tables import SPAN, SPANS, Kinds, offsets, origins, read_batches, roles, starts, tokens_schema, trains
from stages.tokenize import TokenizeConfig
from stages.tokenizer_files import backend

_log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
"""Text encoded at once: enough to keep all cores busy, little enough to keep memory flat."""


FAST_BYTES = 2 << 20
"""Text that a process must have seen before it loads the fast backend, which takes as long as encoding so much without:
a day of new data costs little. Both give the same ids."""

SAMPLE_BATCHES, SAMPLE_ROWS, SAMPLE_CHARACTERS = 8, 32, 2000
"""What of a shard both backends encode: so many record batches, rows in all, and characters of each."""


Tokenized = tuple[pa.ListArray, pa.ListArray, int, int]


def tokenize(config: TokenizeConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Tokenize one shard: `tokens.arrow`, `spans.arrow` and `counts.json`."""
    source = inputs["conversations"] / "conversations.arrow"
    with pa.memory_map(str(source)) as file:
        reader = pa.ipc.open_file(file)
        metadata = reader.schema.metadata or {}
        tokenized = _passed if "ids" in reader.schema.names else _tokenized
    control, trusted = json.loads(metadata.get(b"control", b"[]")), metadata.get(b"trusted") == b"1"
    prompt = metadata.get(b"prompt", b"").decode()
    fast = tokenized is _tokenized and _much(source.stat().st_size)
    _share_cores(work.runtime.workers)
    encoder = _encoder(inputs["tokenizer"], work.runtime.cache / "tokenizers", tuple(control), trusted, fast, prompt)
    if tokenized is _tokenized:
        encoder = _agreed(encoder, source)
    counts = json.loads((inputs["conversations"] / "counts.json").read_text("utf-8"))
    schema = tokens_schema(len(encoder.control), extra=counts.get("kind") != "conversation")
    rows = tokens = exact = forged = highest = 0
    total = counts["rows"] - sum(counts["dropped"].values())
    with _arrow(output / "tokens.arrow", schema) as ids_file, _arrow(output / "spans.arrow", SPANS) as spans_file:
        for batch in read_batches(source):
            try:
                ids, spans, slow, as_text = tokenized(encoder, batch, schema)
            except Unwritable as error:
                row = counts.get("first", 0) + batch.column("row")[error.row].as_py() + 1
                raise UserError(f"{counts['source']}, row {row}: {error}; take the row out") from error
            columns = {**dict(zip(batch.schema.names, batch.columns, strict=True)), "ids": ids, "spans": spans}
            for writer, own in ((ids_file, schema), (spans_file, SPANS)):
                writer.write_batch(pa.RecordBatch.from_arrays([columns[name] for name in own.names], schema=own))
            rows, tokens = rows + len(batch), tokens + len(ids.values)
            exact, forged = exact + slow, forged + as_text
            highest = max(highest, pc.max(ids.values).as_py() or 0)
            work.tell(rows, total, "rows", tokens=tokens)
    document = {**counts, "tokens": tokens, "highest_token": highest, "control_as_text": forged}
    (output / "counts.json").write_text(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    facts: Facts = {"rows": rows, "tokens": tokens, "rows_by_offsets": exact}
    if tokenized is _tokenized:
        facts["rows_by_backend"] = {"fastokens" if encoder.fast else "tokenizers": rows}
    return facts


@lru_cache(maxsize=1)
def _encoder(
    tokenizer: Path, memory: Path, control: tuple[str, ...], trusted: bool, fast: bool, prompt: str
) -> Encoder:
    """One for all shards of a process: reading a tokenizer takes longer than a small shard."""
    return load(backend(tokenizer, memory), control, trusted=trusted, fast=fast, prompt=prompt)


def _share_cores(workers: int) -> None:
    """Have encoders use no more threads than each of the processes has cores: more get in each other's way."""
    for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):
        os.environ.setdefault(name, str(max(1, all_cores() // workers)))


_seen = 0


def _much(size: int) -> bool:
    """Whether this process has seen much text, with so many bytes more."""
    global _seen
    _seen += size
    return _seen > FAST_BYTES


def _agreed(encoder: Encoder, source: Path) -> Encoder:
    """The encoder, without its fast backend where that gives other ids for a sample of the shard's texts."""
    if encoder.fast is None or agrees(encoder.fast, encoder.matching, list(_sample(source))):
        return encoder
    _warn_once()
    return replace(encoder, fast=None)


@cache
def _warn_once() -> None:
    _log.warning("fastokens gives other ids than tokenizers on a sample of these texts: going on without it, slower")


def _sample(source: Path) -> Iterator[str]:
    """The beginnings of some rows from all over a shard."""
    with pa.memory_map(str(source)) as file:
        reader = pa.ipc.open_file(file)
        batches = range(reader.num_record_batches)
        for number in batches[:: max(1, len(batches) // SAMPLE_BATCHES)][:SAMPLE_BATCHES]:
            texts = reader.get_batch(number).column("text")
            for row in range(0, len(texts), max(1, len(texts) * SAMPLE_BATCHES // SAMPLE_ROWS)):
                yield texts[row].as_py()[:SAMPLE_CHARACTERS]


@contextmanager
def _arrow(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """A writer of an Arrow file's record batches."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        yield writer


def _tokenized(encoder: Encoder, batch: pa.RecordBatch, schema: pa.Schema) -> Tokenized:
    """The ids and spans of one record batch of conversations, how many rows did not take the fast path, and how many
    hold the text of a control token."""
    spans = batch.column("spans")
    ends, turns, kinds = spans.flatten().flatten()
    counts = spans.value_lengths().to_numpy().astype(np.int64)
    first_bytes, numbers = starts(ends.to_numpy(), counts).astype(np.int64), kinds.to_numpy()
    origin, train, role = origins(numbers), trains(numbers), roles(numbers)
    first_span = offsets(counts)
    sizes = pc.binary_length(batch.column("text")).to_numpy().astype(np.int64)
    encoded, begins, stops = [], [], []
    for low, high in _chunks(sizes):
        here = slice(first_span[low], first_span[high])
        some = Spans(first_bytes[here], origin[here], train[here], counts[low:high])
        texts, own = batch.column("text")[low:high].to_pylist(), sizes[low:high]
        if encoder.spaced:
            _space(encoder, texts, own, some, role[here])
        try:
            encoded.append(encode(encoder, texts, own, some))
        except Unwritable as error:
            raise Unwritable(low + error.row, str(error)) from error
        begin, end = carry(some, own, encoded[-1], texts)
        begins.append(begin)
        stops.append(end)
    begin, end = np.concatenate(begins), np.concatenate(stops)
    kept = pa.array(begin < end)
    columns = [pa.array(end, pa.uint32()), turns, kinds]
    kept_counts = np.add.reduceat(np.append(begin < end, False), first_span[:-1]) * (counts > 0)
    flat = pa.StructArray.from_arrays([c.filter(kept) for c in columns], fields=list(SPAN))
    ids, lengths = np.concatenate([e.ids for e in encoded]), np.concatenate([e.counts for e in encoded])
    exact, forged = sum(e.exact for e in encoded), sum(e.forged for e in encoded)
    return _lists(ids, lengths, schema, "ids"), _lists(flat, kept_counts, SPANS, "spans"), exact, forged


def _space(encoder: Encoder, texts: list[str], sizes: Positions, spans: Spans, role: Kinds) -> None:
    """Put before raw text the space that the tokenizer puts before the first word of a text: it does so where it adds
    its begin token itself, as for a prompt at inference, and not where that token is read as part of the text."""
    end = 0
    for row, count in enumerate(spans.counts.tolist()):
        first, end = end, end + count
        if count < 2 or spans.origins[first + 1] != ORIGIN_CONTENT or role[first + 1] != ROLES.index("text"):
            continue
        data = texts[row].encode()
        at = int(spans.starts[first + 1])
        if data[:at].decode() in encoder.tokens and not data.startswith((b" ", "▁".encode()), at):
            texts[row] = (data[:at] + b" " + data[at:]).decode()
            sizes[row] += 1
            spans.starts[first + 2 : end] += 1


def _passed(encoder: Encoder, batch: pa.RecordBatch, schema: pa.Schema) -> Tokenized:
    """The same of rows that came as ids. Raises Unwritable for an id that the vocabulary does not have."""
    ids, lengths = batch.column("ids").flatten().to_numpy(), batch.column("ids").value_lengths().to_numpy()
    wrong = np.flatnonzero(ids >= len(encoder.control))
    if len(wrong):
        row = int(np.searchsorted(np.cumsum(lengths), wrong[0], "right"))
        raise Unwritable(row, f"it holds the token {ids[wrong[0]]}: the vocabulary has {len(encoder.control)}")
    return _lists(ids, lengths, schema, "ids"), batch.column("spans"), 0, 0


def _chunks(sizes: Positions) -> Iterator[tuple[int, int]]:
    """Row ranges of about `CHUNK_BYTES` each."""
    group = (np.cumsum(sizes) - sizes) // CHUNK_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(sizes)]
    return pairwise(cuts)


def _lists(values: Any, counts: Positions, schema: pa.Schema, name: str) -> pa.ListArray:
    kind = schema.field(name).type
    values = values if isinstance(values, pa.Array) else pa.array(values, kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets(counts), pa.int32()), values, type=kind)
