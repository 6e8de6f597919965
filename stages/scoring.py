"""The work of score: one shard's tokens become log-probabilities.

Apart from `stages.score`, so that `regrow plan` loads neither Arrow nor NumPy.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.score import ScoreConfig
from stages.stage import Facts, UserError, Work
from stages.tables import BATCH_ROWS, LOG_PROBS, read_batches

TOKENS = 8192
"""Tokens in one forward pass, about."""


def score(config: ScoreConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Score one shard. Raises UserError when the model does not load, or does not keep packed rows apart."""
    network = _load(inputs["model"], config, work)
    head: Any = None
    rows = tokens = 0
    with pa.OSFile(str(output / "log_probs.arrow"), "wb") as sink, pa.ipc.new_file(sink, LOG_PROBS) as writer:
        for batch in read_batches(inputs["tokens"] / "tokens.arrow"):
            column = batch.column("ids")
            lengths = column.value_lengths().to_numpy().astype(np.int64)
            ids = column.flatten().to_numpy()
            scored = []
            for low, high in _ranges(lengths):
                begin, end = int(lengths[:low].sum()), int(lengths[:high].sum())
                found, head = _scored(network, head, ids[begin:end], lengths[low:high])
                scored.append(found)
                work.tell(rows + high, unit="rows")
            values = pa.array(np.concatenate(scored) if scored else np.empty(0, np.float32))
            offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
            lists = pa.ListArray.from_arrays(offsets, values, type=LOG_PROBS.field("log_probs").type)
            writer.write_batch(pa.RecordBatch.from_arrays([lists], schema=LOG_PROBS))
            rows, tokens = rows + len(batch), tokens + len(ids)
            assert len(batch) <= BATCH_ROWS
    return {"rows": rows, "tokens": tokens}


def _load(folder: Path, config: ScoreConfig, work: Work) -> Any:
    """The model, proven to keep packed rows apart. The last one is kept, as a stage's shards follow one another."""
    from packing.isolation import check_isolation
    from stages.generation import load_network

    if folder not in _kept:
        _kept.clear()
        network = load_network(folder, config.precision, work.runtime.device, packed=True)
        try:
            check_isolation(network)
        except ValueError as error:
            raise UserError(f"score: {error}") from error
        _kept[folder] = network
    return _kept[folder]


_kept: dict[Path, Any] = {}


def _ranges(lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Row ranges of about `TOKENS` each."""
    group = (np.cumsum(lengths) - lengths) // TOKENS
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(lengths)]
    return pairwise(cuts)


def _scored(network: Any, head: Any, ids: NDArray[Any], lengths: NDArray[np.int64]) -> tuple[NDArray[np.float32], Any]:
    """[tokens] Log-probabilities (nats), zero for the first token of each row; and the model's head, for the next."""
    import torch

    from packing.collate import IGNORED, Bin, collate
    from stages import lm_head

    labels = ids.astype(np.int64)
    labels[np.cumsum(lengths) - lengths] = IGNORED
    device = network.device
    picked = lm_head.pick(collate([Bin(ids, labels, lengths)]))
    positions = picked["positions"].numpy()
    batch = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in picked.items()}
    found = np.zeros(len(ids), np.float32)
    with torch.inference_mode():
        if head is None:
            first = lengths[:1]
            one = lm_head.model_inputs(collate([Bin(ids[: first[0]], labels[: first[0]], first)]))
            example = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in one.items()}
            head = lm_head.find(network, example)
        found[positions + 1] = -head.token_losses(batch).float().cpu().numpy()
    return found, head
