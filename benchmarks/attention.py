"""Attention alone, forward and backward, on a GPU: `python -m benchmarks.attention`.

Milliseconds of the kernels of `packing.attention` on packed sequences of 8192 of the documents that the training
benchmarks train on, the median of `REPEATS`: as a model calls them, so with the launches of each.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.train_input import lengths
from packing import flash
from packing.attention import attend
from packing.plan import pack

REPEATS = 12
SEQUENCE = 8192
STARTS = (0, 8, 16)
"""Of the batches that are tried, the first packed sequence."""
SHAPES = [(32, 8, 128, 2), (32, 8, 64, 4), (28, 4, 128, 2), (12, 2, 128, 2), (9, 3, 64, 4), (16, 16, 64, 4)]
"""Heads, heads of keys, their size, and sequences in a batch."""


def milliseconds(function: Callable[[], Any]) -> float:
    """The median, by the device's clock."""
    event: Any = torch.cuda.Event
    found: list[float] = []
    for _ in range(REPEATS + 3):
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found[3:])


def times(shape: tuple[int, int, int, int], batch: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    """What each kernel takes, forward + backward."""
    heads, key_heads, size, rows = shape
    boundaries = torch.from_numpy(np.append(0, batch.cumsum()).astype(np.int32)).cuda()
    inputs = []
    for each in (heads, key_heads, key_heads):
        rows_first = torch.randn(1, rows * SEQUENCE, each, size, device="cuda", dtype=torch.bfloat16)
        inputs.append(rows_first.transpose(1, 2).requires_grad_())
    ways: dict[str, dict[str, Any]] = {"torch": {}, "own": {"own": True}}
    if version := flash.installed(torch.cuda.get_device_capability()):
        ways[f"flash-attn {version}"] = {"flash_attn": version}
    found = []
    for name, way in ways.items():
        named = {"cu_seq_lens_q": boundaries, "max_length_q": int(batch.max()), **way}
        forward = partial(attend, nn.Identity(), *inputs, None, **named)
        out, _ = forward()
        backward = partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)
        found.append(f"{name} {milliseconds(forward):.3f} + {milliseconds(backward):.3f}")
    return ", ".join(found)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    sizes = lengths(13 * 4 * SEQUENCE, SEQUENCE)
    plan = pack(sizes, SEQUENCE, global_batch=4, seed=0)
    bins = [plan.documents[a:b] for a, b in itertools.pairwise(plan.offsets)]
    for shape, start in itertools.product(SHAPES, STARTS):
        heads, key_heads, size, rows = shape
        batch = np.concatenate([sizes[each] for each in bins[start : start + rows]])
        batch = np.append(batch, rows * SEQUENCE - batch.sum())
        said = f"{heads}/{key_heads} x {size}, {len(batch)} documents, longest {batch.max()}"
        print(f"{said}: {times(shape, batch)}", flush=True)


if __name__ == "__main__":
    main()
