"""The Arrow tables that pass between stages, and how they are read and written.

fetch -> convert -> tokenize -> pack -> train. Row numbers count a shard's rows from 0 in the order of its file, so a
row can be traced from any table back to the line it came from. All files are Arrow IPC *files* (memory-mappable),
written in fixed-size batches so that the same rows give the same bytes.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BATCH_ROWS = 1024
"""Rows in one record batch of every file."""

SPAN = pa.struct(
    [
        pa.field("end", pa.uint32(), nullable=False),
        pa.field("turn", pa.uint16(), nullable=False),  # marks.NO_TURN: belongs to none
        pa.field("kind", pa.uint8(), nullable=False),  # see stages.marks.kind_of
    ]
)
"""The end of a range, and what the range is. Spans of a row are sorted, do not overlap, and cover the row wholly: each
starts where the one before it ends, the first at 0."""

Kinds = NDArray[np.uint8]
Numbers = NDArray[np.int64]


def origins(kinds: Kinds) -> Kinds:
    """The ORIGIN_* of each span."""
    return kinds & np.uint8(3)


def trains(kinds: Kinds) -> Kinds:
    """The TRAIN_* of each span."""
    return (kinds >> np.uint8(2)) & np.uint8(3)


def roles(kinds: Kinds) -> Kinds:
    """The role of each span, as its place in ROLES."""
    return kinds >> np.uint8(4)


def starts(ends: NDArray[np.uint32], counts: NDArray[np.integer]) -> NDArray[np.uint32]:
    """The start of each span, from the ends of all spans of some rows and the number of spans in each row."""
    found = np.zeros_like(ends)
    found[1:] = ends[:-1]
    first = np.cumsum(counts) - counts
    found[first[counts > 0]] = 0
    return found


def offsets(counts: NDArray[np.integer]) -> Numbers:
    """Where each of some lists begins in what they hold, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


CONVERSATIONS = pa.schema(
    [
        pa.field("row", pa.uint32(), nullable=False),
        pa.field("part", pa.uint8(), nullable=False),  # a source row may give several sequences: chosen and rejected
        pa.field("text", pa.string(), nullable=False),  # the rendered conversation
        pa.field("spans", pa.list_(pa.field("item", SPAN, nullable=False)), nullable=False),  # in UTF-8 bytes
        pa.field("identity", pa.binary(16), nullable=False),  # see stages.sequences.identity
        pa.field("extra", pa.string(), nullable=False),  # what an objective needs besides, as JSON; "" for nothing
    ]
)
"""`conversations.arrow`: what convert writes for one shard. Parts of one row stand next to each other.

`counts.json` beside it says of what kind the rows are, and so what they hold:

- `conversation`: one part; no extra.
- `preference`: part 0 is the chosen and part 1 the rejected sequence; extra is the same for both, `{"margin": 1.5}` if
  the data says how much better. The prompt's turns have TRAIN_NO.
- `unpaired_preference`: one part; extra `{"label": true}`. The prompt's turns have TRAIN_NO.
- `stepwise`: one part; extra `{"labels": [true, false]}`. The steps are the turns of role `text`, in order, that do not
  have TRAIN_NO; a label is about the last token of its turn.
- `prompt`: one part that ends where the model is to answer, and has TRAIN_NO; extra is the row's other columns.

Metadata: `control`, the texts (JSON) that are control tokens where the template wrote them; `trusted`, `1` where they
are also in content; and `prompt`, what the template asks the assistant with.
"""

CONVERSATIONS_OF_IDS = pa.schema(
    [
        pa.field("ids", pa.list_(pa.field("item", pa.uint32(), nullable=False)), nullable=False)
        if field.name == "text"
        else field
        for field in CONVERSATIONS
    ]
)
"""The same for rows that came as token ids: `spans` are in tokens."""


SPANS = pa.schema(
    [
        pa.field("row", pa.uint32(), nullable=False),
        pa.field("spans", pa.list_(pa.field("item", SPAN, nullable=False)), nullable=False),  # in tokens
        pa.field("identity", pa.binary(16), nullable=False),
    ]
)
"""`spans.arrow`: beside `tokens.arrow`, row for row and batch for batch, what pack decides by without reading a token.
A sequence has as many tokens as its last span's end says."""


def tokens_schema(vocabulary: int, extra: bool = False) -> pa.Schema:
    """`tokens.arrow`: what tokenize writes for one shard to be trained on. Ids are uint16 where the vocabulary fits,
    else uint32; with `extra` (all kinds of rows but conversations), what an objective needs besides."""
    ids = pa.uint16() if vocabulary <= 65536 else pa.uint32()
    return pa.schema(
        [
            pa.field("ids", pa.list_(pa.field("item", ids, nullable=False)), nullable=False),
            *([SPANS.field("spans"), pa.field("extra", pa.string(), nullable=False)] if extra else []),
        ]
    )


LOG_PROBS = pa.schema([pa.field("log_probs", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False)])
"""`log_probs.arrow`: what score writes for one shard of tokens, row by row: nats a token, zero for the first."""

TOP = pa.schema(
    [
        pa.field("k", pa.uint32(), nullable=False),
        pa.field("ids", pa.list_(pa.field("item", pa.uint32(), nullable=False)), nullable=False),
        pa.field("log_probs", pa.list_(pa.field("item", pa.float16(), nullable=False)), nullable=False),
    ]
)
"""`top.arrow`: what score writes instead with `top_k`, row by row: in the place of each token the k that a teacher
finds likeliest there, the likeliest first, and their log-probabilities in nats; token by token, k of each, and for a
row's first token anything."""

MISMATCHED = pa.schema(
    [
        pa.field("ids", pa.list_(pa.field("item", pa.uint32(), nullable=False)), nullable=False),
        pa.field("answer", pa.uint32(), nullable=False),  # where the answer starts; it goes on to the end
        LOG_PROBS.field("log_probs"),
    ]
)
"""`mismatched.arrow`: what score also writes for rows of kind `unpaired_preference`, one for each: its prompt with the
answer of another row, for objectives that estimate how far the model has moved from where it started."""


def documents_schema(shards: int, sequence_length: int, wrapped: bool = False) -> pa.Schema:
    """`documents.arrow` and `heldout_documents.arrow`: the sequences that pack kept, as an index; no token is copied.

    Numbers are uint16 where `shards` and `sequence_length` fit. A document is the first `length` tokens of a sequence;
    the sequences of one row stand next to each other, and a row that trains several times is listed again. The tokens
    of held-out sequences are copied: `heldout_tokens.arrow` has them in the order of `heldout_documents.arrow`.

    Of `wrapped` documents the pieces stand here, a row's next to each other: `length` tokens from `begin` on, in which
    `trained` counts from 0. Of held-out ones only the piece's own tokens are copied.
    """
    shard = pa.uint16() if shards <= 65536 else pa.uint32()
    count = pa.uint16() if sequence_length <= 65535 else pa.uint32()
    trained = pa.struct([pa.field("start", count, nullable=False), pa.field("end", count, nullable=False)])
    return pa.schema(
        [
            pa.field("shard", shard, nullable=False),  # index into plan.json's "shards"
            pa.field("row", pa.uint32(), nullable=False),  # position in that shard's tokens table
            pa.field("number", pa.uint32(), nullable=False),  # of the row in the shard's source, for people
            pa.field("length", count, nullable=False),  # tokens used
            pa.field("trained", pa.list_(pa.field("item", trained, nullable=False)), nullable=False),
            *([pa.field("begin", pa.uint32(), nullable=False)] if wrapped else []),  # of the piece within its sequence
        ]
    )


BINS = pa.schema(
    [
        pa.field("documents", pa.list_(pa.field("item", pa.uint32(), nullable=False)), nullable=False),
        pa.field("length", pa.uint32(), nullable=False),  # tokens in the bin
        pa.field("trained", pa.uint32(), nullable=False),  # trained tokens in the bin
    ]
)
"""`bins.arrow` and `heldout_bins.arrow`: packed sequences. `documents` index the documents table beside it. Training
bins stand in step order: `global_batch` consecutive bins are one optimizer step (the last step may be short)."""


def write_table(path: Path, schema: pa.Schema, rows: Iterable[dict[str, object]]) -> int:
    """Write row dictionaries as an Arrow file in batches of `BATCH_ROWS`; return how many."""
    count = 0
    batch: list[dict[str, object]] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for row in rows:
            batch.append(row)
            count += 1
            if len(batch) == BATCH_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return count


def read_table(path: Path) -> pa.Table:
    """A memory-mapped Arrow file: nothing is copied until it is touched."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file, one at a time."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)
