"""The work of score: one shard's tokens become log-probabilities.

Apart from `stages.score`, so that `regrow plan` loads neither Arrow nor NumPy.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.context import learned
from stages.mismatched import mismatched
from stages.score import ScoreConfig
from stages.stage import Facts, UserError, Work
from stages.tables import BATCH_ROWS, LOG_PROBS, MISMATCHED, TOP, offsets, read_batches, read_table
from stages.tokenizer_files import refuse_other_words, words_of

TOKENS = 8192
"""Tokens in one forward pass, about."""
LIKELY = 2**26
"""Likeliest tokens that are held and written at once, about: 400 MB."""


def score(config: ScoreConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Score one shard. Raises UserError for rows that nothing compares, when the model does not load, or does not keep
    packed rows apart, and when a teacher has other tokens."""
    kind = json.loads((inputs["tokens"] / "counts.json").read_text()).get("kind")  # none where no row is left
    if config.top_k is None and kind not in (None, "preference", "unpaired_preference"):
        raise UserError(
            f"score: the rows are of kind {kind}, and only judged answers are compared with the model before training: "
            "read them with convert.format preference or unpaired_preference, or choose another train.objective"
        )
    known = None
    if "tokenizer" in inputs:
        refuse_other_words(inputs["model"], inputs["tokenizer"])
        # Models of a family are padded to sizes of their own: a student may have no row for what is no token.
        known = 1 + max(words_of(inputs["model"]).values())
        if config.top_k is not None and config.top_k > known:
            raise UserError(
                f"score.top_k is {config.top_k}, but the teacher knows {known} tokens: set it to at most that"
            )
    head = _load(inputs["model"], config, work)
    if config.top_k is not None:
        return _write_top(head, config.top_k, known, inputs["tokens"] / "tokens.arrow", output / "top.arrow", work)
    source = inputs["tokens"] / "tokens.arrow"
    rows = tokens = 0
    with _writing(output / "log_probs.arrow", LOG_PROBS) as writer:
        for batch in read_batches(source):
            column = batch.column("ids")
            ids, lengths = column.flatten().to_numpy(), column.value_lengths().to_numpy().astype(np.int64)
            lists = _lists(_all_scored(head, ids, lengths), lengths, LOG_PROBS, "log_probs")
            writer.write_batch(pa.RecordBatch.from_arrays([lists], schema=LOG_PROBS))
            rows, tokens = rows + len(batch), tokens + len(ids)
            work.tell(rows, unit="rows")
            assert len(batch) <= BATCH_ROWS
    if kind == "unpaired_preference":
        tokens += _write_mismatched(head, source, output / "mismatched.arrow", work)
    return {"rows": rows, "tokens": tokens}


def _write_top(head: Any, k: int, known: int | None, source: Path, target: Path, work: Work) -> Facts:
    """The k likeliest tokens in the place of every token, of the `known` ones."""
    import torch

    rows = tokens = 0
    with _writing(target, TOP) as writer:
        for batch in _pieces(source, LIKELY // k):
            column = batch.column("ids")
            ids, lengths = column.flatten().to_numpy(), column.value_lengths().to_numpy().astype(np.int64)
            likely, log_probs = np.zeros((len(ids), k), np.uint32), np.zeros((len(ids), k), np.float16)
            taken, kept = _readable(head, lengths)
            for low, high in _ranges(kept, TOKENS):
                some = taken[int(kept[:low].sum()) : int(kept[:high].sum())]
                packed = _batch(ids[some], kept[low:high], head.causal.device)
                with torch.inference_mode():
                    found, values = head.top(packed, k, known)
                places = some[packed["positions"].cpu().numpy() + 1]
                likely[places], log_probs[places] = found.cpu().numpy(), values.float().cpu().numpy()
            columns = [pa.array(np.full(len(batch), k), pa.uint32())]
            columns += [
                _lists(likely.ravel(), lengths * k, TOP, "ids"),
                _lists(log_probs.ravel(), lengths * k, TOP, "log_probs"),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=TOP))
            rows, tokens = rows + len(batch), tokens + len(ids)
            work.tell(rows, unit="rows")
    return {"rows": rows, "tokens": tokens, "top_k": k}


def _pieces(source: Path, most: int) -> Iterator[pa.RecordBatch]:
    """The rows of a file of tokens, about `most` tokens of them at a time."""
    for batch in read_batches(source):
        lengths = batch.column("ids").value_lengths().to_numpy().astype(np.int64)
        for low, high in _ranges(lengths, most):
            yield batch.slice(low, high - low)


def _write_mismatched(head: Any, source: Path, target: Path, work: Work) -> int:
    """Score every prompt with another row's answer; returns how many tokens they are."""
    context = getattr(head.causal.config.get_text_config(), "max_position_embeddings", None)
    crossed = mismatched(read_table(source), context)
    rows = tokens = 0
    with _writing(target, MISMATCHED) as writer:
        while some := list(islice(crossed, BATCH_ROWS)):
            ids, lengths = np.concatenate([each for each, _ in some]), np.array([len(each) for each, _ in some])
            columns = [
                _lists(ids, lengths, MISMATCHED, "ids"),
                pa.array([begin for _, begin in some], pa.uint32()),
                _lists(_all_scored(head, ids, lengths), lengths, MISMATCHED, "log_probs"),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=MISMATCHED))
            rows, tokens = rows + len(some), tokens + len(ids)
            work.tell(rows, unit="mismatched rows")
    return tokens


@contextmanager
def _writing(path: Path, schema: pa.Schema) -> Iterator[Any]:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        yield writer


def _lists(values: NDArray[Any], lengths: NDArray[np.int64], schema: pa.Schema, name: str) -> pa.ListArray:
    return pa.ListArray.from_arrays(
        pa.array(offsets(lengths), pa.int32()), pa.array(values), type=schema.field(name).type
    )


def _load(folder: Path, config: ScoreConfig, work: Work) -> Any:
    """The model's head (`stages.lm_head`), the model proven to keep packed rows apart. The last one is kept, as a
    stage's shards follow one another."""
    from packing.isolation import check_isolation
    from stages import lm_head, quantization
    from stages.generation import load_network

    wanted = (folder, config.precision, work.runtime.device, config.quantize)
    if wanted not in _kept:
        _kept.clear()
        network = load_network(folder, config.precision, work.runtime.device, packed=True, quantize=config.quantize)
        try:
            with quantization.exact(network):
                check_isolation(network)
        except ValueError as error:
            raise UserError(f"score: {error}") from error
        _kept[wanted] = lm_head.find(network, _batch(np.arange(8), np.array([8]), network.device))
    return _kept[wanted]


_kept: dict[tuple[Path, str, str, str | None], Any] = {}


def _batch(ids: NDArray[Any], lengths: NDArray[np.int64], device: Any) -> dict[str, Any]:
    """Rows side by side, of which all tokens count but each one's first."""
    import torch

    from packing.collate import IGNORED, Bin, collate
    from stages import lm_head

    labels = ids.astype(np.int64)
    labels[np.cumsum(lengths) - lengths] = IGNORED
    picked = lm_head.pick(collate([Bin(ids, labels, lengths)]))
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in picked.items()}


def _ranges(lengths: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about `most` tokens each."""
    group = (np.cumsum(lengths) - lengths) // most
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(lengths)]
    return pairwise(cuts) if len(lengths) else iter(())


def _scored(head: Any, ids: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """[tokens] Log-probabilities (nats), zero for the first token of each row."""
    import torch

    batch = _batch(ids, lengths, head.causal.device)
    found = np.zeros(len(ids), np.float32)
    with torch.inference_mode():
        found[batch["positions"].cpu().numpy() + 1] = -head.token_losses(batch).float().cpu().numpy()
    return found


def _all_scored(head: Any, ids: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """The same for rows of any number of tokens; zero also for those that the model cannot read."""
    found = np.zeros(len(ids), np.float32)
    taken, kept = _readable(head, lengths)
    for low, high in _ranges(kept, TOKENS):
        some = taken[int(kept[:low].sum()) : int(kept[:high].sum())]
        found[some] = _scored(head, ids[some], kept[low:high])
    return found


def _readable(head: Any, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[tokens] The places of the tokens that a model can read in rows of some lengths, and how many those are in each
    row that has any.

    All, but of a model with learned positions, which has none for the end of a row that is longer. Training
    refuses those (`stages.context`).
    """
    context = learned(head.causal)
    if context is None:
        return np.arange(lengths.sum()), lengths[lengths > 0]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) < context
    return np.flatnonzero(within), np.minimum(lengths[lengths > 0], context)
