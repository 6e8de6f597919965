"""Preparing data, side by side in one run: `python -m benchmarks.data [--rows N] [--megabytes N] [--peers PYTHON]`.

Raw JSON Lines of multi-turn chats to packed tokens with what trains: regrow, TRL's `SFTTrainer`, Axolotl's
`preprocess`; same rows, same tokenizer, nothing cached, two processes each. Then what regrow costs again, with 1 % more
rows, on conversations of 2 and of 128 turns, and as the data grows. Everything is made under `build/data`.

`--peers` is a Python that has Axolotl (`make bench-data-peers` makes one); without it that row is left out. TRL is
taken from this environment. A peer that would take long may be given every n-th row (`--every`); the seconds that it
prepares in are scaled, those that it starts in are not, and those that we take to count its tokens are left out. About
ten minutes on two idle cores; `--rows 3000 --megabytes 15 --grown 0.02 0.04` tries everything out in three.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.data_input import make, model, with_turns

LENGTH = 4096
HERE = Path(__file__).parent


@dataclass
class Measured:
    """A command as a whole: its time, that of all cores, its largest process, and what it said last, as JSON."""

    wall: float
    cpu: float
    peak: int
    said: dict[str, Any] = field(default_factory=dict)
    failed: str = ""


def measured(command: list[str], log: Path) -> Measured:
    """Run a command; seconds and MB as the kernel counted them for it and all its children."""
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert process.stdout is not None
        out = process.stdout.read().decode(errors="replace")
        _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    found = Measured(wall, used.ru_utime + used.ru_stime, used.ru_maxrss // 1024)
    last = next((line for line in reversed(out.splitlines()) if line.startswith("{")), "{}")
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        found.failed = lines[-1] if lines else f"exit code {process.returncode}"
    else:
        found.said = json.loads(last)
        found.wall -= found.said.get("counting", 0.0)
        found.cpu -= found.said.get("counting_cpu", 0.0)
    return found


def recipe(path: Path, rows: list[Path], base: Path, **pack: Any) -> Path:
    """A recipe that prepares some files."""
    document = {
        "name": "data",
        "fetch": {"model": {"path": str(base)}, "data": {"chats": {"files": [str(row) for row in rows]}}},
        "convert": {"format": "messages"},
        "pack": {"sequence_length": LENGTH, "overlong": "truncate", **pack},
    }
    path.write_text(json.dumps(document))
    return path


def regrow(path: Path, store: Path, *stages: str) -> Measured:
    """The preparation of a recipe in a store."""
    return measured(
        [sys.executable, "-m", "benchmarks.data_regrow", str(path), str(store), *stages], store.with_suffix(".log")
    )


def every(source: Path, path: Path, step: int) -> float:
    """Write every `step`-th row to `path`; return which share of the bytes that is."""
    with source.open("rb") as rows, path.open("wb") as file:
        file.writelines(islice(rows, 0, None, step))
    return path.stat().st_size / source.stat().st_size


def line(name: str, found: Measured, size: float, share: float = 1.0) -> float:
    """Print a contender; return its tokens a second. `share` is how much of the rows it was given."""
    if found.failed:
        print(f"| {name} | refused: {found.failed[:90]} |")
        return 0.0
    said = found.said
    tokens = said["tokens"] if "tokens" in said else said["tokenize"]["tokens"]
    stored = said["bytes"] if "bytes" in said else said["tokenize_bytes"] + said["pack_bytes"]
    preparing = min(said["seconds"], found.wall) if share < 1 else 0.0
    scale = (found.wall - preparing + preparing / share) / found.wall
    wall, rate = found.wall * scale, tokens / share / (found.wall * scale)
    note = f" (scaled from {share:.0%} of the rows)" if share < 1 else ""
    print(
        f"| {name}{note} | {wall:.1f} | {found.cpu * scale:.1f} | {found.peak} | "
        f"{size / wall:.1f} | {rate / 1e6:.3f} | {stored / tokens:.2f} |"
    )
    return rate


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="Axolotl gets every n-th row")
    parser.add_argument("--every-trl", type=int, default=1)
    parser.add_argument("--peers", default="")
    parser.add_argument("--grown", type=float, nargs="*", default=[0.5, 1.0, 2.0], help="GB for the memory's slope")
    asked = parser.parse_args()
    root = HERE.parent / "build" / "data"
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    base, rows = root / "model", root / f"rows-{asked.rows}-{asked.megabytes}.jsonl"
    if not base.is_dir():
        model(base)
    if not rows.is_file():
        make(rows, asked.rows, asked.megabytes * 10**6, root)
    size = rows.stat().st_size / 1e6
    with rows.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
        file.seek(0)
        count = sum(1 for _ in file)
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{count} conversations, {size:.1f} MB (sha256 {digest}); {machine}\n")
    own = prepare(asked, rows, size, base, work)
    again(own, rows, base, work)
    turns(rows, base, work)
    grown(asked.grown, rows, base, work)


def prepare(asked: argparse.Namespace, rows: Path, size: float, base: Path, work: Path) -> Measured:
    """The three side by side; return what regrow took."""
    print("| | wall s | CPU s | largest process MB | MB/s | M tokens/s | bytes a token |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    own = regrow(recipe(work / "data.yaml", [rows], base), work / "own")
    ours = line("regrow, as a process without a server", own, size)
    command = [str(Path(sys.executable).parent / "regrow"), "run", str(work / "data.yaml"), "+pack"]
    os.environ.update(REGROW_STORE=str(work / "whole/store"), REGROW_CACHE=str(work / "whole/cache"))
    whole = measured(command, work / "whole.log")
    whole.said = regrow(work / "data.yaml", work / "whole").said  # looks them up in that store
    line("regrow run, with Prefect", whole, size)
    peers = []
    share = every(rows, some := work / "trl.jsonl", asked.every_trl) if asked.every_trl > 1 else 1.0
    source = some if asked.every_trl > 1 else rows
    for masked in ("no", "yes"):
        trl = [
            sys.executable,
            str(HERE / "data_trl.py"),
            str(source),
            str(base),
            str(work / f"trl-{masked}"),
            str(LENGTH),
        ]
        found = measured([*trl, masked], work / f"trl-{masked}.log")
        peers.append(line(f"TRL, {'masked' if masked == 'yes' else 'no mask'}", found, size, share))
    if asked.peers:
        share = every(rows, some := work / "axolotl.jsonl", asked.every)
        axolotl = [asked.peers, str(HERE / "data_axolotl.py"), str(some), str(base), str(work / "axolotl"), str(LENGTH)]
        peers.append(line("Axolotl, masked", measured(axolotl, work / "axolotl.log"), size, share))
    stages = ", ".join(f"{name} {seconds}" for name, seconds in own.said.get("stages", {}).items())
    print(f"\nregrow's stages, in seconds: {stages}; trained tokens {own.said.get('pack', {}).get('trained_tokens')}")
    print(f"times the tokens a second of the fastest peer: {ours / max([1.0, *peers]):.1f}\n")
    return own


def again(own: Measured, rows: Path, base: Path, work: Path) -> None:
    """A second run, and one with 1 % more rows in a file of their own, beside what the first run took."""
    first = regrow(work / "data.yaml", work / "own")
    every(rows, more := work / "more.jsonl", 100)
    text = more.read_text().replace('{"role": "user", "content": "', '{"role": "user", "content": "Again: ')
    more.write_text(text)
    added = regrow(recipe(work / "more.yaml", [rows, more], base), work / "own")
    print(f"again: {first.wall:.2f} s (cached: {', '.join(first.said.get('cached', []))})")
    print(
        f"with 1 % more: {added.wall:.2f} s and {added.cpu:.2f} s of CPU, {added.wall / own.wall:.1%} and "
        f"{added.cpu / own.cpu:.1%} of the whole; of stages {added.said.get('stages')} {added.failed}\n"
    )


def turns(rows: Path, base: Path, work: Path) -> None:
    """The cost of a token in short and in long conversations."""
    print("| turns | rows | convert and tokenize s | CPU µs a token |")
    print("| ---: | ---: | ---: | ---: |")
    costs = {}
    for number in (2, 128):
        path = work / f"turns-{number}.jsonl"
        with_turns(rows, path, number, 256_000 // number)
        found = regrow(recipe(work / f"turns-{number}.yaml", [path], base), work / f"turns-{number}", "tokenize")
        if found.failed:
            print(f"| {number} | {found.failed} |")
            continue
        seconds = found.said["stages"]["convert"] + found.said["stages"]["tokenize"]
        tokens = found.said["tokenize"]["tokens"]
        costs[number] = found.cpu / tokens
        print(f"| {number} | {256_000 // number} | {seconds:.1f} | {costs[number] * 1e6:.3f} |")
    if len(costs) == 2:
        print(f"\na token in 128 turns costs {costs[128] / costs[2]:.2f} times one in 2\n")


def _repeat(rows: Path, path: Path, size: int) -> None:
    """Write whole rows, again and again, until there are `size` bytes."""
    with path.open("wb") as file:
        while True:
            with rows.open("rb") as source:
                for row in source:
                    if file.tell() >= size:
                        return
                    file.write(row)


def grown(sizes: list[float], rows: Path, base: Path, work: Path) -> None:
    """Memory as the data grows: the same rows again and again, none of which pack may drop."""
    stages = ("fetch", "convert", "tokenize", "pack")
    print(f"| GB | wall s | rows | tokens | {' | '.join(f'{stage} MB' for stage in stages)} |")
    print(f"| ---: | ---: | ---: | ---: |{' ---: |' * len(stages)}")
    found_peaks: dict[float, dict[str, int]] = {}
    for number in sizes:
        path, store = work / "grown.jsonl", work / "grown"
        _repeat(rows, path, int(number * 1e9))
        peaks: dict[str, int] = {}
        wall = 0.0
        for stage in stages:
            found = regrow(recipe(work / "grown.yaml", [path], base, deduplicate=False), store, stage)
            if found.failed:
                sys.exit(f"{stage} of {number} GB: {found.failed}")
            peaks[stage] = found.said["peaks"][stage]
            wall += found.wall
        found_peaks[number] = peaks
        cells = [f"{number}", f"{wall:.1f}", *(f"{found.said['tokenize'][each]:,}" for each in ("rows", "tokens"))]
        print(f"| {' | '.join([*cells, *map(str, peaks.values())])} |", flush=True)
        shutil.rmtree(store)
        path.unlink()
    if len(sizes) > 1:
        first, last = found_peaks[sizes[0]], found_peaks[sizes[-1]]
        slopes = {stage: (last[stage] - first[stage]) / (sizes[-1] - sizes[0]) for stage in first}
        print("\nMB of memory a further GB: " + ", ".join(f"{stage} {slope:.0f}" for stage, slope in slopes.items()))


if __name__ == "__main__":
    main()
