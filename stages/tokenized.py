"""The rows that tokenize wrote, as columns of numbers: how long they are, and which of their tokens train.

A row of the data is one or more sequences: a conversation is one, a preference pair two (chosen, rejected), which are
kept, dropped and packed together. Spans are read a shard at a time; the files with the token ids are not touched.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stages.errors import UserError
from stages.marks import NO_TURN, ORIGIN_CONTENT, ORIGIN_END, ORIGIN_TEMPLATE, ROLES, TRAIN_UNSET, TRAIN_YES
from stages.reward_models import SEPARATOR
from stages.stage import Tell
from stages.tables import Numbers, origins, read_table, roles, starts, trains

Flags = NDArray[np.bool_]

SEQUENCES = {"preference": 2}
"""Sequences that a row gives, by kind of data; of the kinds not named here, one."""
SPEECH = ("said", "endings", "unanswered", "opened", "empty", "masked")
"""What `Rows` tells of the turns of each shard."""


@dataclass(frozen=True)
class Shard:
    """One shard of tokens."""

    path: str
    source: str
    split: str
    counts: Mapping[str, Any]
    """Its `counts.json`: rows read, and rows dropped before this stage."""

    @property
    def kind(self) -> str:
        """What its rows are: conversation, preference, unpaired_preference, stepwise or prompt."""
        return str(self.counts.get("kind", "conversation"))

    @property
    def rows(self) -> int:
        """Rows that came out of convert."""
        return int(self.counts["rows"] - sum(self.counts["dropped"].values()))

    def place(self, number: int) -> str:
        """A row by its number in the shard, for people: its number in the file, counted from 1."""
        first = int(self.counts.get("first", 0))
        return f"{self.path}, row {first + number + 1}"

    @property
    def places(self) -> dict[str, list[str]]:
        """Where the first rows are that convert dropped, by reason, for people."""
        found = self.counts.get("places", {})
        return {reason: [f"{self.path}, {place}" for place in places] for reason, places in found.items()}


def _all_there(now: Collection[str], then: Collection[str]) -> None:
    return None


@dataclass(frozen=True)
class Files:
    """Where the files of all shards are: `spans.arrow` and `counts.json` below one, `tokens.arrow` below another."""

    spans: Path
    tokens: Path
    show: Callable[[Collection[str], Collection[str]], None] = _all_there
    """Has the tokens of the first shards (paths) at hand, and begins to fetch those of the others. See `Work.show`."""
    window: int | None = None
    """Tokens that are at hand at once, or a shard more; null for all."""

    def in_turn(self, shards: Sequence[Shard]) -> Iterator[Shard]:
        """Shards one by one. The tokens of each are at hand until the next one is asked for."""
        windows: list[list[Shard]] = []
        for shard in shards:
            held = sum(int(each.counts["tokens"]) for each in windows[-1]) if windows and self.window else 0
            if windows and (self.window is None or held < self.window):
                windows[-1].append(shard)
            else:
                windows.append([shard])
        for now, then in zip_longest(windows, windows[1:], fillvalue=()):
            self.show([shard.path for shard in now], [shard.path for shard in then])
            yield from now


@dataclass(frozen=True)
class Spans:
    """The spans of some sequences, flat."""

    counts: Numbers
    """[sequences] Spans in each."""
    starts: Numbers
    ends: Numbers
    turns: NDArray[np.uint16]
    kinds: NDArray[np.uint8]

    @property
    def sequence(self) -> Numbers:
        """[spans] The sequence each belongs to."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def lengths(self) -> Numbers:
        """[sequences] Tokens in each: its last span ends with it."""
        found = np.zeros(len(self.counts), np.int64)
        some = self.counts > 0
        found[some] = self.ends[np.cumsum(self.counts)[some] - 1]
        return found


@dataclass(frozen=True)
class Rows:
    """All rows of all shards, in order. Of a row's sequences, `place` is the first's, and the others follow it."""

    shard: NDArray[np.uint32]
    number: NDArray[np.uint32]
    """[rows] The row's number in the shard's source."""
    place: NDArray[np.uint32]
    """[rows] Position in the shard's tokens table."""
    identity: pa.Array
    """[rows] 16 bytes each."""
    length: Numbers
    """[rows, sequences] Tokens, before any truncation."""
    used: Numbers
    """[rows, sequences] Tokens that are left of a row longer than the limit when it is cut."""
    trained: Numbers
    """[rows, sequences] Trained tokens among those used."""
    ranges: Numbers
    """[rows, sequences] How many ranges they are."""
    starts: NDArray[np.uint32]
    """[ranges] Where the ranges start, counted from the sequence's first token."""
    ends: NDArray[np.uint32]
    said: Numbers
    """[shards, roles] Tokens of contents, by who says them."""
    endings: Numbers
    """[shards] Spans that end a turn and train."""
    unanswered: Numbers
    """[shards] Conversations whose last word is a user's."""
    opened: Numbers
    """[shards] Conversations in which the assistant speaks first."""
    empty: Numbers
    """[shards] The assistant's turns that say nothing."""
    masked: Numbers
    """[shards] Tokens of contents that do not train."""

    def __len__(self) -> int:
        return int(self.shard.size)

    @property
    def sequences(self) -> int:
        """Sequences that a row gives."""
        return int(self.length.shape[1])


def find_shards(spans: Path) -> list[Shard]:
    """The shards whose spans tokenize wrote to a folder, by path.

    Raises UserError when they cannot be packed together: data of several kinds, a source read in several formats, or
    steps that are closed in several ways.
    """
    shards = []
    for path in sorted(file.parent for file in spans.rglob("spans.arrow")):
        counts = json.loads((path / "counts.json").read_text("utf-8"))
        shards.append(Shard(path.relative_to(spans).as_posix(), counts["source"], counts["split"], counts))
    # A shard of which no row is left is of no kind and format: it goes with the others.
    kind = next((shard.counts["kind"] for shard in shards if "kind" in shard.counts), "conversation")
    shards = [replace(shard, counts={"kind": kind, **shard.counts}) for shard in shards]
    first_of: dict[str, Shard] = {}
    closed: Shard | None = None
    for shard in shards:
        if shard.kind != shards[0].kind:
            raise UserError(
                f"{shards[0].source} holds rows of kind {shards[0].kind}, {shard.source} of kind {shard.kind}: one "
                "model trains on one kind. Take one of the sources out, or give it another convert.sources.NAME.format"
            )
        first = first_of.setdefault(shard.source, shard) if "format" in shard.counts else shard
        if first.counts.get("format") != shard.counts.get("format"):
            raise UserError(
                f"{first.path} was read as {first.counts['format']}, {shard.path} as {shard.counts['format']}: set "
                f"convert.sources.{shard.source}.format"
            )
        if SEPARATOR in shard.counts:  # not where every row was dropped
            closed = closed or shard
            ours, theirs = closed.counts[SEPARATOR], shard.counts[SEPARATOR]
            if ours != theirs:
                raise UserError(
                    f"{closed.source} closes its steps with {ours!r} ({closed.path}), {shard.source} with {theirs!r} "
                    f"({shard.path}): a model that judges steps looks for one separator. Give all sources the same, "
                    "e.g. with convert.sources.NAME.options.separator"
                )
    return shards


def read_rows(
    folder: Path, shards: Sequence[Shard], train_on: str | Sequence[str], limit: int | None, tell: Tell
) -> Rows:
    """All rows of the shards whose spans are in `folder`; see `may_train` for `train_on`.

    A row of more than `limit` tokens is cut: each of its sequences to an equal share of them. None is for no limit.
    """
    width = SEQUENCES.get(shards[0].kind, 1) if shards else 1
    total = sum(shard.rows for shard in shards)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("shard", "number", "place", "length", "used", "trained", "ranges", "starts", "ends")
    }
    identities: list[pa.Array] = []
    told: dict[str, list[Any]] = {name: [] for name in SPEECH}
    done = 0
    for number, shard in enumerate(shards):
        table = read_table(folder / shard.path / "spans.arrow")
        spans = read_spans(table)
        length = spans.lengths.reshape(-1, width)
        used = length
        if limit is not None:
            used = np.where(length.sum(1, keepdims=True) > limit, np.minimum(length, limit // width), length)
        may = may_train(spans, train_on)
        trained, ranges, begins, ends = trained_ranges(spans, may, used.ravel())
        count = len(length)
        read = (
            np.full(count, number, np.uint32),
            table["row"].to_numpy()[::width],
            np.arange(0, count * width, width, dtype=np.uint32),
            length,
            used,
            trained.reshape(-1, width),
            ranges.reshape(-1, width),
            begins,
            ends,
        )
        for each, values in zip(columns.values(), read, strict=True):
            each.append(values)
        identity = table["identity"].combine_chunks()
        identities.append(identity.take(pa.array(np.arange(0, count * width, width))) if width > 1 else identity)
        for name, value in _speech(spans, may, used.ravel()).items():
            told[name].append(value)
        done += count
        tell(done, total, "rows")
    if not done:
        none, few = np.empty((0, width), np.int64), np.empty(0, np.uint32)
        return Rows(few, few, few, pa.array([], pa.binary(16)), none, none, none, none, few, few, *[none] * len(SPEECH))
    joined = {name: np.concatenate(each) for name, each in columns.items()}
    return Rows(
        identity=pa.concat_arrays(identities), **joined, **{name: np.array(each) for name, each in told.items()}
    )


def by_shard(shard: NDArray[np.integer[Any]], shards: int) -> list[slice]:
    """[shards] Where the rows of each shard are among some in the order of their shards. `shard` [rows] is whose each
    is."""
    return [slice(*bounds) for bounds in pairwise(np.searchsorted(shard, np.arange(shards + 1)).tolist())]


def read_spans(table: Any) -> Spans:
    """The spans in an Arrow table or record batch."""
    column = table["spans"]
    counts = _numbers(pc.list_value_length(column))
    flat = pc.list_flatten(column)
    ends, turns, kinds = (pc.struct_field(flat, [field]).to_numpy() for field in range(3))
    return Spans(counts, _numbers(starts(ends, counts)), _numbers(ends), turns, kinds)


def consecutive(starts: Numbers, counts: Numbers) -> Numbers:
    """The numbers start, start + 1, ..., `count` of them, for each pair: starts 7 2, counts 2 3 -> 7 8 2 3 4."""
    ends = np.cumsum(counts)
    found: Numbers = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    return found


def _numbers(values: Any) -> Numbers:
    array = values if isinstance(values, np.ndarray) else values.to_numpy(zero_copy_only=False)
    return np.asarray(array, np.int64)


def _chosen(train_on: str | Sequence[str]) -> Flags:
    """[ROLES] Whose turns train. Raw text always does."""
    names = {"assistant": ("assistant",), "last": ("assistant",), "all": ROLES[1:]}.get(str(train_on), tuple(train_on))
    return np.array([role in names or role == "text" for role in ROLES])


def may_train(spans: Spans, train_on: str | Sequence[str]) -> Flags:
    """[spans] Which train: contents and ends of the turns that `train_on` chooses, or that the data itself says train.

    `train_on` is `assistant`, `all`, `last` (the assistant's last turn) or a list of roles.
    """
    origin, role, flag = origins(spans.kinds), roles(spans.kinds), trains(spans.kinds)
    chosen = _chosen(train_on)[role]
    if train_on == "last":
        assistant = role == ROLES.index("assistant")
        sequence = spans.sequence
        last = np.zeros(len(spans.counts), spans.turns.dtype)
        np.maximum.at(last, sequence[assistant], spans.turns[assistant])
        chosen &= ~assistant | (spans.turns == last[sequence])
    may: Flags = (origin != ORIGIN_TEMPLATE) & ((flag == TRAIN_YES) | ((flag == TRAIN_UNSET) & chosen))
    return may


def trained_ranges(
    spans: Spans, may: Flags, used: Numbers
) -> tuple[Numbers, Numbers, NDArray[np.uint32], NDArray[np.uint32]]:
    """Which tokens of each sequence train, among its first `used` ones and without the very first.

    `may` [spans] tells which spans train. Returns trained tokens a sequence, ranges a sequence, and the ranges' starts
    and ends, flat. Ranges that touch are one.
    """
    train = np.flatnonzero(may)
    sequence = spans.sequence[train]
    begins, ends = np.maximum(spans.starts[train], 1), np.minimum(spans.ends[train], used[sequence])
    some = begins < ends
    begins, ends, sequence = begins[some], ends[some], sequence[some]
    apart = np.append(True, (sequence[1:] != sequence[:-1]) | (begins[1:] != ends[:-1]))[: len(sequence)]
    tokens = np.bincount(sequence, weights=ends - begins, minlength=len(used)).astype(np.int64)
    ranges = np.bincount(sequence[apart], minlength=len(used))
    last = np.append(apart[1:], True)[: len(sequence)]
    return tokens, ranges, begins[apart].astype(np.uint32), ends[last].astype(np.uint32)


def _speech(spans: Spans, may: Flags, used: Numbers) -> dict[str, Any]:
    """What a shard's turns look like: who says how much, who begins, who ends, and what is empty."""
    assistant, text = ROLES.index("assistant"), ROLES.index("text")
    role, origin, sizes = roles(spans.kinds), origins(spans.kinds), spans.ends - spans.starts
    of_turn = (origin != ORIGIN_TEMPLATE) & (spans.turns != NO_TURN)
    content = of_turn & (origin == ORIGIN_CONTENT)
    talk = np.flatnonzero(of_turn & (role != ROLES.index("system")))
    new = np.append(True, np.diff(spans.sequence[talk]) > 0)[: len(talk)]
    last = np.append(new[1:], True)[: len(talk)]
    written = np.flatnonzero(of_turn)
    turn = spans.sequence[written] * (NO_TURN + 1) + spans.turns[written]
    goes_on = turn[1:] == turn[:-1]
    alone = written[~(np.append(False, goes_on) | np.append(goes_on, False))[: len(turn)]]
    return {
        "said": np.bincount(role[content], weights=sizes[content], minlength=len(ROLES)).astype(np.int64),
        "endings": int((may & (origin == ORIGIN_END) & (spans.ends <= used[spans.sequence])).sum()),
        "unanswered": int((role[talk[last]] == ROLES.index("user")).sum()),
        "opened": int((role[talk[new]] == assistant).sum()),
        "masked": int(sizes[content & ~may].sum()),
        "empty": int(((origin[alone] == ORIGIN_END) & np.isin(role[alone], (assistant, text))).sum()),
    }
