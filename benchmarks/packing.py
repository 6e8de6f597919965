"""How fast and how full packing is: our plan, TRL's packing and Axolotl's, on the same lengths.

    python -m benchmarks.packing                        several distributions: ours and TRL's
    python -m benchmarks.packing --axolotl PYTHON       also Axolotl's, by a Python that has it installed
    python -m benchmarks.packing --large                only ours, for 1,000,000 and 100,000,000 rows (half a minute)

Every contender runs in a process of its own, one after another. `cpu` is the processor time of the packing call alone,
the second time it is made, so that nothing is compiled in it (the first time from ten million rows on); `peak` is the
process's largest resident size so far. TRL packs tokens, not an index, so it gets rows of that many token ids (one byte
each), made before its clock starts. Axolotl packs the rows in a shuffled order, in groups of 100,000, with its default
of at most 200 rows a sequence.

The program fails when our plan needs more sequences than a peer, or more than 0.02 % (or one) above the fewest possible
on chat lengths.
"""

import argparse
import json
import re
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


def child(name: str, cases: dict[str, tuple[int, str]]) -> None:
    """Run one contender on every case and print its figures, a line a case."""
    for title, (capacity, path) in cases.items():
        lengths = np.load(path)
        work = CONTENDERS[name](lengths, capacity)
        if len(lengths) < 10_000_000:
            work()
        begin = time.process_time(), time.perf_counter()
        bins = work()
        cpu, wall = time.process_time() - begin[0], time.perf_counter() - begin[1]
        # Not ru_maxrss, which begins with the peak of the process that started this one.
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]
        fewest = -(-int(lengths.sum(dtype=np.int64)) // capacity)
        print(json.dumps([title, name, len(lengths), fewest, bins, cpu, wall, peak]), flush=True)


def measure(python: str, name: str, cases: dict[str, tuple[int, str]]) -> dict[str, tuple[int, int]]:
    """Print one contender's lines of the table; return the fewest possible and its own sequences by case."""
    command = [python, "-m", "benchmarks.packing", "--child", name, json.dumps(cases)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    if run.returncode:
        raise SystemExit(f"{name} failed")
    found = {}
    for line in run.stdout.splitlines():
        if line.startswith("["):
            title, _, count, fewest, bins, cpu, wall, peak = json.loads(line)
            found[title] = fewest, bins
            above = f"{bins / fewest - 1:.3%} ({bins - fewest:,})"
            print(
                f"| {title} | {name} | {count:,} | {bins:,} | {above} | {cpu:.3f} | {wall:.3f} | {peak:,.0f} |",
                flush=True,
            )
    return found


def judge(ours: dict[str, tuple[int, int]], name: str, theirs: dict[str, tuple[int, int]]) -> None:
    """Stop when our plan is fuller nowhere near what it should be."""
    for title, (fewest, bins) in ours.items():
        if title.startswith(CHAT) and bins > max(fewest * (1 + ABOVE), fewest + 1):
            raise SystemExit(f"{title}: {bins} sequences are more than {ABOVE:.2%} above {fewest}")
        if theirs[title][1] < bins:
            raise SystemExit(f"{title}: {name} needs {theirs[title][1]} sequences, regrow {bins}")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--axolotl", metavar="PYTHON")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "CASES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child[0], json.loads(arguments.child[1]))
    contenders = dict.fromkeys(("regrow",) if arguments.large else ("regrow", "TRL"), sys.executable)
    if arguments.axolotl and not arguments.large:
        contenders["Axolotl"] = arguments.axolotl
    made = distributions()
    if arguments.large:
        made = {f"chat 8192, {n:,}": (8192, lognormal(n, 8192, 721)) for n in (1_000_000, 100_000_000)}
    print("| lengths | | rows | sequences | above the fewest | cpu s | wall s | peak MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cases = {}
        for number, (title, (capacity, lengths)) in enumerate(made.items()):
            np.save(Path(folder) / f"{number}.npy", lengths)
            cases[title] = capacity, str(Path(folder) / f"{number}.npy")
        del made, lengths
        ours = None
        for name, python in contenders.items():
            found = measure(python, name, cases)
            ours = ours or found
            judge(ours, name, found)


if __name__ == "__main__":
    main()
