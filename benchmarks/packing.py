"""How fast and how full packing is: our plan, TRL's packing and Axolotl's, on the same lengths.

    python -m benchmarks.packing                        several distributions: ours and TRL's
    python -m benchmarks.packing --axolotl PYTHON       also Axolotl's, by a Python that has it installed
    python -m benchmarks.packing --large                only ours, for 1,000,000 and 100,000,000 rows (half a minute)

Every contender runs in a process of its own, one after another: `cold` is its whole process in seconds, with imports
and reading the lengths; `cpu` is the processor time of the packing call alone, the second time it is made, so that
nothing is compiled in it (the first time from ten million rows on); `peak` is the process's largest resident size. TRL
packs tokens, not an index, so it gets rows of that many token ids (one byte each), made before its clock starts.
Axolotl packs the rows in a shuffled order, in groups of 100,000, with its default of at most 200 rows a sequence.

The program fails when our plan needs more sequences than a peer, or more than 0.02 % (or one) above the fewest possible
on chat lengths.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int32]

CHAT = "chat"
ABOVE = 0.0002
"""How much above the fewest possible our plan may be on chat lengths."""


def lognormal(count: int, capacity: int, mean: float, sigma: float = 1.0) -> Lengths:
    """Log-normal lengths of that mean, none longer than `capacity`."""
    lengths = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(lengths, 1, capacity).astype(np.int32)


def uniform(count: int, low: int, high: int) -> Lengths:
    """Lengths from `low` to `high`."""
    return np.random.default_rng(0).integers(low, high + 1, count).astype(np.int32)


def distributions() -> dict[str, tuple[int, Lengths]]:
    """(capacity, lengths) by name; a name that begins with `chat` is held to the bound."""
    return {
        "chat 4096": (4096, lognormal(100_000, 4096, 721)),
        "chat 8192": (8192, lognormal(100_000, 8192, 721)),
        "alpaca 2048": (2048, lognormal(100_000, 2048, 119)),
        "reason 16384": (16384, lognormal(10_000, 16384, 3769)),
        "uniform 2k-6k, 8192": (8192, uniform(20_000, 2000, 6000)),
        "uniform 2500-4600, 8192": (8192, uniform(20_000, 2500, 4600)),
        "all alike, 3000 of 8192": (8192, np.full(20_000, 3000, np.int32)),
        "short and overfull, 512": (512, lognormal(50_000, 512, 400)),
    }


def regrow(lengths: Lengths, capacity: int) -> Callable[[], int]:
    """Ours, with the order of steps."""
    from packing.plan import pack

    return lambda: len(pack(lengths, capacity, global_batch=64, seed=0))


def _rows(lengths: Lengths) -> Any:
    import pyarrow as pa

    offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))
    ids = pa.array(np.zeros(offsets[-1], np.uint8))
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), ids)})


def trl(lengths: Lengths, capacity: int) -> Callable[[], int]:
    """TRL as its trainers call it: `datasets.map` over batches of 1,000 rows, in memory."""
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    rows = datasets.Dataset(_rows(lengths))
    settings = {"keep_in_memory": True, "load_from_cache_file": False}
    return lambda: len(pack_dataset(rows, capacity, "bfd", map_kwargs=settings))


def axolotl(lengths: Lengths, capacity: int) -> Callable[[], int]:
    """Axolotl's own function with its sampler's settings, in one process."""
    from axolotl.utils.samplers.multipack import pack_parallel

    shuffled = np.random.default_rng(0).permutation(lengths)
    return lambda: len(pack_parallel(shuffled, capacity, group_size=100_000, bin_size=200, num_processes=1))


CONTENDERS = {"regrow": regrow, "TRL": trl, "Axolotl": axolotl}


def child(name: str, path: str, capacity: int) -> None:
    """Run one contender twice and print its figures."""
    work = CONTENDERS[name](np.load(path), capacity)
    if len(np.load(path, mmap_mode="r")) < 10_000_000:
        work()
    begin = time.process_time(), time.perf_counter()
    bins = work()
    cpu, wall = time.process_time() - begin[0], time.perf_counter() - begin[1]
    print(json.dumps([cpu, wall, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, bins]))


def measure(python: str, name: str, path: Path, capacity: int) -> tuple[float, float, float, float, int]:
    """Seconds of the whole process, processor and wall seconds of packing, peak in MB, and sequences."""
    begin = time.perf_counter()
    command = [python, "-m", "benchmarks.packing", "--child", name, str(path), str(capacity)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if run.returncode:
        raise SystemExit(f"{name}: {run.stderr.strip().splitlines()[-1]}")
    cold = time.perf_counter() - begin
    cpu, wall, peak, bins = json.loads(run.stdout.splitlines()[-1])
    return cold, cpu, wall, peak, bins


HEADER = """| lengths | | rows | sequences | above the fewest | cpu s | wall s | cold s | peak MB |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def compare(title: str, capacity: int, lengths: Lengths, contenders: dict[str, str], folder: Path) -> dict[str, int]:
    """Print a line a contender; return the sequences of each."""
    path = folder / "lengths.npy"
    np.save(path, lengths)
    fewest = -(-int(lengths.sum(dtype=np.int64)) // capacity)
    found = {}
    for name, python in contenders.items():
        cold, cpu, wall, peak, bins = measure(python, name, path, capacity)
        found[name] = bins
        above = f"{bins / fewest - 1:.3%} ({bins - fewest:,})"
        figures = f"{cpu:.3f} | {wall:.3f} | {cold:.1f} | {peak:,.0f}"
        print(f"| {title} | {name} | {len(lengths):,} | {bins:,} | {above} | {figures} |", flush=True)
    ours = found["regrow"]
    if title.startswith(CHAT) and ours > max(fewest * (1 + ABOVE), fewest + 1):
        raise SystemExit(f"{title}: {ours} sequences are more than {ABOVE:.2%} above {fewest}")
    for name, bins in found.items():
        if bins < ours:
            raise SystemExit(f"{title}: {name} needs {bins} sequences, regrow {ours}")
    return found


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--axolotl", metavar="PYTHON")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "LENGTHS", "CAPACITY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, path, capacity = arguments.child
        return child(name, path, int(capacity))
    contenders = dict.fromkeys(("regrow",) if arguments.large else tuple(CONTENDERS)[:2], sys.executable)
    if arguments.axolotl and not arguments.large:
        contenders["Axolotl"] = arguments.axolotl
    cases = distributions()
    if arguments.large:
        cases = {f"chat 8192, {count:,}": (8192, lognormal(count, 8192, 721)) for count in (1_000_000, 100_000_000)}
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        for title, (capacity, lengths) in cases.items():
            compare(title, capacity, lengths, contenders, Path(folder))


if __name__ == "__main__":
    main()
