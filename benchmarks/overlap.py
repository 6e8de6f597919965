"""What looking for near-duplicates and contaminated rows costs.

    python -m benchmarks.overlap [--rows 100000] [--datasketch 2000]

Makes token tables of that many rows (log-normal lengths, mean 400 tokens; every tenth row is another with one token in
fifty changed; 500 rows held out) and times pack's two searches over them: processor seconds, and the process's peak.
`--datasketch N` does the same with datasketch's MinHash and LSH (as its documentation does it) on N rows, and scales.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stages.contamination import find_contamination
from stages.marks import ORIGIN_CONTENT, TRAIN_UNSET, kind_of
from stages.near_duplicates import near_duplicates
from stages.tables import BATCH_ROWS, SPANS, tokens_schema
from stages.tokenized import Files, find_shards, read_rows

HELD_OUT = 500


def rows(count: int) -> list[np.ndarray[Any, np.dtype[np.uint16]]]:
    """Token ids; Zipf-like, so that runs repeat as in text."""
    random = np.random.default_rng(0)
    sizes = np.clip(random.lognormal(np.log(400) - 0.32, 0.8, count), 10, 4096).astype(np.int64)
    made: list[np.ndarray[Any, np.dtype[np.uint16]]] = []
    for number, size in enumerate(sizes):
        if number % 10 == 9:
            ids = made[random.integers(number)].copy()
            places = random.integers(0, len(ids), max(1, len(ids) // 50))
            ids[places] = random.integers(0, 49_000, len(places))
        else:
            ids = np.minimum(random.zipf(1.3, size), 49_000).astype(np.uint16)
        made.append(ids)
    return made


def write(folder: Path, split: str, ids: list[np.ndarray[Any, np.dtype[np.uint16]]]) -> None:
    """One shard of rows with a question (the first half) and an answer."""
    place = folder / split / "00000"
    place.mkdir(parents=True)
    paths = {place / "tokens.arrow": tokens_schema(49_152), place / "spans.arrow": SPANS}
    kinds = [kind_of(ORIGIN_CONTENT, role, TRAIN_UNSET) for role in ("user", "assistant")]
    for path, schema in paths.items():
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for low in range(0, len(ids), BATCH_ROWS):
                some = ids[low : low + BATCH_ROWS]
                ends = [(len(each) // 2, len(each)) for each in some]
                columns = {
                    "row": range(low, low + len(some)),
                    "ids": some,
                    "spans": [[{"end": e, "turn": n, "kind": kinds[n]} for n, e in enumerate(both)] for both in ends],
                    "identity": [f"{split}{low + i}".encode().ljust(16) for i in range(len(some))],
                }
                own = {name: columns[name] for name in schema.names}
                writer.write_batch(pa.RecordBatch.from_pydict(own, schema=schema))
    highest = max((int(each.max()) for each in ids), default=0)
    counts = {"rows": len(ids), "dropped": {}, "source": split, "split": split, "highest_token": highest}
    (place / "counts.json").write_text(json.dumps(counts))


def datasketch(ids: list[np.ndarray[Any, np.dtype[np.uint16]]]) -> int:
    """Rows that datasketch calls near-duplicates of an earlier one."""
    from datasketch import MinHash, MinHashLSH

    index, found = MinHashLSH(threshold=0.8, num_perm=128), 0
    for number, each in enumerate(ids):
        signature = MinHash(num_perm=128)
        signature.update_batch([each[i : i + 5].tobytes() for i in range(len(each) - 4)])
        if index.query(signature):
            found += 1
        else:
            index.insert(number, signature)
    return found


def main() -> None:
    """Print a line a search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--datasketch", type=int, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = rows(arguments.rows)
        write(folder, "train", made)
        write(folder, "heldout", [each[::-1].copy() for each in made[:HELD_OUT]])
        few = made[: arguments.datasketch or 0]
        tokens = sum(map(len, made))
        del made
        files, shards = Files(folder, folder), find_shards(folder)
        read = read_rows(folder, shards, "assistant", 4096, lambda *_, **__: None)
        heldout = np.array([shard.split == "heldout" for shard in shards])[read.shard]
        print(f"{arguments.rows:,} rows, {tokens:,} tokens")
        begin = time.process_time()
        near = near_duplicates(files, shards, read, np.arange(len(read)), 0.8)
        print(f"near-duplicates: {time.process_time() - begin:.1f} s, {len(near):,} rows")
        begin = time.process_time()
        contaminated = find_contamination(files, shards, read, heldout, ~heldout, 0.5)
        print(f"contamination: {time.process_time() - begin:.1f} s, {len(contaminated.rows):,} rows")
        print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")
        if few:
            begin = time.process_time()
            found = datasketch(few)
            seconds = (time.process_time() - begin) * arguments.rows / len(few)
            print(f"datasketch: {seconds:.0f} s (scaled from {len(few):,} rows, of which {found:,})")


if __name__ == "__main__":
    main()
