"""How fast and how full packing is: our plan, the greedy rule written out, and TRL's packing, on the same lengths.

    python -m benchmarks.packing            100,000 rows, and our plan for 1,000,000
    python -m benchmarks.packing --big      also our plan for 100,000,000 (half a minute, 2 GB)

Every contender runs in a process of its own, started cold: `wall` is from its start to its end, with imports and
reading the lengths; `packing` is the call alone; `peak` is the process's largest resident size. TRL packs tokens, not
an index, so it gets rows of that many token ids (two bytes each), made before its clock starts.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int32]

REPEATS = {100_000: 3, 1_000_000: 3}
"""How often a case runs; the fastest counts, because other work on the machine only ever slows it down."""


def regrow(lengths: Lengths, capacity: int) -> Callable[[], int]:
    """Ours, with the order of steps."""
    from packing.plan import pack

    def work() -> int:
        plan = pack(lengths, capacity, global_batch=64, seed=0)
        return len(plan)

    return work


def greedy(lengths: Lengths, capacity: int) -> Callable[[], int]:
    """Best-fit decreasing, a document at a time."""

    def work() -> int:
        spaces: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fit = bisect_left(spaces, length)
            insort(spaces, (spaces.pop(fit) if fit < len(spaces) else capacity) - length)
        return len(spaces)

    return work


def _rows(lengths: Lengths) -> Any:
    import pyarrow as pa

    offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))
    ids = pa.array(np.zeros(offsets[-1], np.uint16))
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), ids)})


def trl_dataset(lengths: Lengths, capacity: int) -> Callable[[], int]:
    """TRL as its trainers call it: `datasets.map` over batches of 1,000 rows, in memory."""
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    rows = datasets.Dataset(_rows(lengths))
    settings = {"keep_in_memory": True, "load_from_cache_file": False}
    return lambda: len(pack_dataset(rows, capacity, "bfd", map_kwargs=settings))


def trl_global(lengths: Lengths, capacity: int) -> Callable[[], int]:
    """TRL's algorithm on all rows at once."""
    from trl.data_utils import _pack_bfd

    rows = _rows(lengths)
    return lambda: len(_pack_bfd(rows, capacity))


CONTENDERS = {
    "regrow": regrow,
    "greedy rule": greedy,
    "TRL pack_dataset bfd": trl_dataset,
    "TRL bfd, all rows at once": trl_global,
}


def lognormal(count: int, capacity: int) -> Lengths:
    """Lengths like those of chats: log-normal, mean about 700 tokens, none longer than `capacity`."""
    lengths = np.random.default_rng(0).lognormal(6.08, 1.0, count)
    return np.clip(lengths, 1, capacity).astype(np.int32)


def child(name: str, path: str, capacity: int) -> None:
    """Run one contender and print its figures."""
    work = CONTENDERS[name](np.load(path), capacity)
    begin = time.perf_counter()
    bins = work()
    seconds = time.perf_counter() - begin
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, bins]))


def measure(name: str, path: Path, capacity: int) -> tuple[float, float, float, int]:
    """Wall seconds of a cold process, seconds of packing, peak in MB, and bins."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.packing", "--child", name, str(path), str(capacity)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall = time.perf_counter() - begin
    seconds, peak, bins = json.loads(told.splitlines()[-1])
    return wall, seconds, peak, bins


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "LENGTHS", "CAPACITY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, path, capacity = arguments.child
        return child(name, path, int(capacity))
    cases = [(100_000, 4096, list(CONTENDERS)), (1_000_000, 8192, ["regrow"])]
    if arguments.big:
        cases.append((100_000_000, 8192, ["regrow"]))
    print(f"| {'rows':>11} | capacity | {'':26} |  wall s | packing s | peak MB |    bins |     fill |")
    print(f"| {'-' * 10}: | -------: | {'-' * 26} | ------: | --------: | ------: | ------: | -------: |")
    with tempfile.TemporaryDirectory() as folder:
        for count, capacity, names in cases:
            lengths = lognormal(count, capacity)
            path = Path(folder) / f"{count}.npy"
            np.save(path, lengths)
            tokens = int(lengths.sum(dtype=np.int64))
            for name in names:
                wall, seconds, peak, bins = min(measure(name, path, capacity) for _ in range(REPEATS.get(count, 1)))
                fill = tokens / bins / capacity
                print(
                    f"| {count:>11,} | {capacity:>8,} | {name:26} | {wall:7.2f} | {seconds:9.3f} | {peak:7,.0f} "
                    f"| {bins:7,} | {fill:8.3%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
