"""pack: every decision that needs all rows, made as an index; no token is copied.

Which rows train and which are held out, what is dropped and why, which tokens train, and which packed sequence each row
goes into (`packing.plan`). Changing any of it retokenizes nothing. Writes `documents.arrow` and `bins.arrow`, the same
for held-out rows, `plan.json`, and the data report (`stages.data_report`).

A row trains only tokens of its turns' contents and end markers, never the chat template's headers, and never its first
token, which has nothing before it to be predicted from. A row from the data counts once in the report: it is packed, or
dropped for the first reason that applies, in the order of `REASONS`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from packing.plan import Plan
from packing.plan import pack as pack_lengths
from stages import data_report
from stages.selection import KEPT, REASONS, Flags, Numbers, Rows, Shard, drop_reasons, find_shards, held_out, read_rows
from stages.stage import Facts, Stage, StageConfig, UserError, Work
from stages.tables import BATCH_ROWS, BINS, DOCUMENTS, RANGE, read_table


class PackConfig(StageConfig):
    """What trains, what is held out, and how rows are packed into sequences and steps."""

    sequence_length: int = Field(default=2048, ge=64, le=1 << 20)
    """Tokens in a packed sequence, and the most that a row may have."""
    global_batch: int = Field(default=16, ge=1)
    """Packed sequences per optimizer step, over all devices."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What to do with a row longer than `sequence_length`: leave it out and count it, cut its end off, or stop."""
    train_on: Literal["assistant", "all", "last"] = "assistant"
    """Whose turns train: the assistant's, everyone's, or the assistant's last. Raw text always trains, and a turn's own
    `train` flag in the data goes before this."""
    heldout_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of rows held out from training, besides the sources with `split: heldout`. A row's own hash decides, so it
    stays on its side when data is added."""
    deduplicate: bool = True
    """Keep only the first of identical rows. Rows that are also held out never train, whatever this says."""
    max_documents: int | None = Field(default=None, ge=1)
    """The most rows in a packed sequence; null for no limit."""
    seed: int = Field(default=0, ge=0)
    """Decides which of equally long rows go together, and the order of steps."""


def run(config: PackConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Plan all rows. Raises UserError when there is nothing to train on, or at an overlong row if it is an error."""
    shards = find_shards(inputs["tokens"])
    rows = read_rows(inputs["tokens"], shards, config.train_on, config.sequence_length, work.tell)
    if len(rows) == 0:
        raise UserError(
            "there are no rows to pack: every source is empty, or every row was dropped before. See convert"
        )
    if config.overlong == "error":
        _refuse_overlong(rows, shards, inputs["tokens"], config.sequence_length)
    heldout = held_out(rows, shards, config.heldout_fraction)
    limit = None if config.overlong == "truncate" else config.sequence_length
    reasons = drop_reasons(rows, heldout, limit, config.deduplicate)
    kept = reasons == KEPT
    training, holding = np.flatnonzero(kept & ~heldout), np.flatnonzero(kept & heldout)
    if len(training) == 0:
        raise UserError(_nothing_left(reasons, heldout, config))

    length = np.minimum(rows.length, config.sequence_length)
    plan = _write("", training, rows, length, config, output)
    heldout_plan = _write("heldout_", holding, rows, length, config, output)
    tokens = int(length[training].sum())
    description: dict[str, Any] = {
        "sequence_length": config.sequence_length,
        "global_batch": config.global_batch,
        "seed": config.seed,
        "shards": [{"path": s.path, "source": s.source, "split": s.split} for s in shards],
        "bins": len(plan),
        "steps": -(-len(plan) // config.global_batch),
        "max_documents": max(_most_documents(plan), _most_documents(heldout_plan)),
        "documents": len(training),
        "tokens": tokens,
        "trained_tokens": int(rows.trained_tokens[training].sum()),
        "truncated": int((rows.length[kept] > config.sequence_length).sum()),
        "fill": tokens / (len(plan) * config.sequence_length),
        "heldout_documents": len(holding),
        "heldout_tokens": int(length[holding].sum()),
        "heldout_trained_tokens": int(rows.trained_tokens[holding].sum()),
    }
    (output / "plan.json").write_text(json.dumps(description, indent=1) + "\n")
    report = data_report.compile_report(
        description,
        [_of_source(name, shards, rows, length, heldout, reasons) for name in _sources(shards)],
        rows.length,
    )
    data_report.write(report, output)
    return {
        "rows": report["rows"],
        "documents": len(training),
        "tokens": tokens,
        "trained_tokens": description["trained_tokens"],
        "bins": len(plan),
        "steps": description["steps"],
        "fill": round(description["fill"], 4),
        "dropped": report["dropped"],
        "truncated": description["truncated"],
        "heldout_rows": len(holding),
    }


def _sources(shards: Sequence[Shard]) -> list[str]:
    return sorted({shard.source for shard in shards})


def _refuse_overlong(rows: Rows, shards: Sequence[Shard], tokens: Path, limit: int) -> None:
    overlong = np.flatnonzero(rows.length > limit)
    if len(overlong) == 0:
        return
    first = overlong[0]
    path = shards[rows.shard[first]].path
    table = read_table(tokens / path / "tokens.arrow")
    row = table.column("row")[int(rows.place[first])].as_py()
    raise UserError(
        f"{path}, row {row}: {rows.length[first]} tokens do not fit into pack.sequence_length {limit} "
        f"({len(overlong)} such rows, the longest with {rows.length.max()}). Raise it, or set pack.overlong to drop or "
        "truncate"
    )


def _nothing_left(reasons: NDArray[np.uint8], heldout: Flags, config: PackConfig) -> str:
    """Why no row trains, and how to mend it."""
    counts = {reason: int((reasons == code).sum()) for code, reason in enumerate(REASONS, 1)}
    told = [f"{count} {reason}" for reason, count in counts.items() if count]
    if kept_aside := int(((reasons == KEPT) & heldout).sum()):
        told.append(f"{kept_aside} held out")
    mends = {
        "overlong": f"raise pack.sequence_length ({config.sequence_length}) or set pack.overlong: truncate",
        "nothing to train on": f"look at pack.train_on ({config.train_on}) and at the rows' own train flags",
        "in held-out": "give other rows to the sources with split: heldout",
        "duplicate": "",
    }
    most = max(counts, key=lambda reason: counts[reason])
    mend = mends[most] if counts[most] else "give a source without split: heldout, or lower pack.heldout_fraction"
    return f"no row is left to train on: of {len(reasons)}, {', '.join(told)}. To mend it, {mend}"


def _write(prefix: str, chosen: Numbers, rows: Rows, length: Numbers, config: PackConfig, output: Path) -> Plan:
    """Pack the chosen rows and write their documents and bins."""
    lengths = length[chosen]
    plan = pack_lengths(
        lengths,
        config.sequence_length,
        global_batch=config.global_batch,
        seed=config.seed,
        max_documents=config.max_documents,
    )
    last = np.cumsum(rows.ranges)
    picked = _spread(last[chosen] - rows.ranges[chosen], rows.ranges[chosen])
    ranges = pa.StructArray.from_arrays(
        [pa.array(rows.starts[picked], pa.uint32()), pa.array(rows.ends[picked], pa.uint32())], fields=list(RANGE)
    )
    documents = [
        pa.array(rows.shard[chosen], pa.uint32()),
        pa.array(rows.place[chosen], pa.uint32()),
        pa.array(np.zeros(len(chosen), np.uint32)),
        pa.array(lengths, pa.uint32()),
        _lists(DOCUMENTS, "trained", np.append(0, np.cumsum(rows.ranges[chosen])), ranges),
    ]
    _write_columns(output / f"{prefix}documents.arrow", DOCUMENTS, documents)
    trained = rows.trained_tokens[chosen]
    bins = [
        _lists(BINS, "documents", plan.offsets, pa.array(plan.documents)),
        pa.array(_sums(lengths[plan.documents], plan.offsets), pa.uint32()),
        pa.array(_sums(trained[plan.documents], plan.offsets), pa.uint32()),
    ]
    _write_columns(output / f"{prefix}bins.arrow", BINS, bins)
    return plan


def _spread(starts: Numbers, counts: Numbers) -> Numbers:
    """The numbers start, start + 1, ..., `count` of them, for each pair: starts 7 2, counts 2 3 -> 7 8 2 3 4."""
    ends = np.cumsum(counts)
    spread: Numbers = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    return spread


def _sums(values: Numbers, offsets: Numbers) -> Numbers:
    """Sums of consecutive runs of values; no run is empty."""
    sums: Numbers = np.add.reduceat(values, offsets[:-1]) if len(offsets) > 1 else values
    return sums


def _lists(schema: pa.Schema, name: str, offsets: Numbers, values: pa.Array) -> pa.Array:
    """A list column in pieces, each with 32-bit offsets of its own."""
    kind = schema.field(name).type
    return pa.chunked_array(
        [
            pa.ListArray.from_arrays(
                pa.array(offsets[low : low + BATCH_ROWS + 1] - offsets[low], pa.int32()),
                values.slice(offsets[low], offsets[min(low + BATCH_ROWS, len(offsets) - 1)] - offsets[low]),
                type=kind,
            )
            for low in range(0, len(offsets) - 1, BATCH_ROWS)
        ],
        kind,
    )


def _write_columns(path: Path, schema: pa.Schema, columns: Iterable[Any]) -> None:
    table = pa.Table.from_arrays(list(columns), schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table, max_chunksize=BATCH_ROWS)


def _most_documents(plan: Plan) -> int:
    return int(np.diff(plan.offsets).max()) if len(plan) else 0


def _of_source(
    name: str, shards: Sequence[Shard], rows: Rows, length: Numbers, heldout: Flags, reasons: NDArray[np.uint8]
) -> data_report.Source:
    """What became of one source's rows."""
    own = [shard for shard in shards if shard.source == name]
    mine = np.isin(rows.shard, [number for number, shard in enumerate(shards) if shard.source == name])
    kept = mine & (reasons == KEPT)
    dropped = data_report.added([shard.counts["dropped"] for shard in own])
    for code, reason in enumerate(REASONS, 1):
        if count := int((mine & (reasons == code)).sum()):
            dropped[reason] = dropped.get(reason, 0) + count
    return data_report.Source(
        name=name,
        split=own[0].split,
        rows=sum(shard.counts["rows"] for shard in own),
        dropped=dropped,
        places=data_report.joined([shard.counts.get("places", {}) for shard in own]),
        unwritten=data_report.added([shard.counts.get("unwritten", {}) for shard in own]),
        turns_without_end=sum(shard.counts.get("turns_without_end", 0) for shard in own),
        documents=int((kept & ~heldout).sum()),
        heldout=int((kept & heldout).sum()),
        truncated=int((kept & (rows.length > length)).sum()),
        tokens=int(length[kept & ~heldout].sum()),
        trained_tokens=int(rows.trained_tokens[kept & ~heldout].sum()),
    )


STAGE = Stage(name="pack", artifact="plan", version=1, config=PackConfig, run=run)
