"""What fetching costs: many small files and ten more, and one large file. `python -m benchmarks.fetch [GIGABYTES]`

CPU seconds are this process's and its children's, so that a busy machine changes them little. The large file's are
beside those of reading and hashing it once (`sha256`), which nothing that checks its bytes can do without.
"""

import hashlib
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages import fetch
from stages.build import build
from stages.runtime import Runtime
from stages.store import open_store


def measured(name: str, work: Callable[[], Any], megabytes: float = 0.0) -> None:
    def cpu() -> float:
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    before, started = cpu(), time.perf_counter()
    work()
    wall, used = time.perf_counter() - started, cpu() - before
    speed = f"  {megabytes / used:7.0f} MB per CPU second" if megabytes else ""
    print(f"{name:34} {wall:7.2f} s wall {used:7.2f} s CPU{speed}", flush=True)


def row(number: int) -> bytes:
    words = random.Random(number)
    text = " ".join(words.choice(WORDS) for _ in range(200))
    turns = [{"role": role, "content": text} for role in ("user", "assistant")]
    return json.dumps({"messages": turns}).encode()


WORDS = [f"w{random.Random(n).getrandbits(24):x}" for n in range(5000)]


def main(gigabytes: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        (home / "model").mkdir()
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (home / "model" / name).write_text("{}")
        runtime = Runtime(store=str(home / "store"), cache=home / "cache")
        store = open_store(runtime.store, runtime.cache)

        def fetched(files: str) -> None:
            config = fetch.FetchConfig.model_validate(
                {"model": {"path": str(home / "model")}, "data": {"mine": {"files": str(home / files)}}}
            )
            build(fetch.STAGE, config, {}, store, runtime)

        (home / "many").mkdir()
        sample = [row(n) for n in range(100)]
        for number in range(1000):
            (home / "many" / f"{number:04}.jsonl").write_bytes(b"\n".join([b'{"n": %d}' % number, *sample[:10]]))
        measured("1,000 files of 30 kB", lambda: fetched("many"))
        measured("the same again", lambda: fetched("many"))
        for number in range(1000, 1010):
            (home / "many" / f"{number:04}.jsonl").write_bytes(b"\n".join([b'{"n": %d}' % number, *sample[:10]]))
        measured("ten files more", lambda: fetched("many"))

        with (home / "large.jsonl").open("wb") as file:
            block = b"\n".join(row(n) for n in range(3000)) + b"\n"
            for number in range(round(gigabytes * 1e9 / len(block))):
                file.write(b'{"n": %d}\n' % number + block)
        size = (home / "large.jsonl").stat().st_size / 1e6

        def hashed() -> None:
            with (home / "large.jsonl").open("rb") as file:
                hashlib.file_digest(file, "sha256")

        measured("sha256 alone", hashed, size)
        measured(f"one file of {size:.0f} MB", lambda: fetched("large.jsonl"), size)
        measured("the same again", lambda: fetched("large.jsonl"))
        with (home / "large.jsonl").open("ab") as file:
            file.write(block)
        measured(f"with {len(block) / 1e6:.0f} MB appended", lambda: fetched("large.jsonl"), size)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"largest child: {peak:.0f} MiB")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
