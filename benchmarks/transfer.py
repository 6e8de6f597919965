"""Large files to a bucket and back: regrow's upload and verified download beside plain s3fs, on one server, by turns.

    python -m benchmarks.transfer [GIGABYTES] [ROUNDS]

The server is SeaweedFS on this machine, so the network costs nothing and what the client computes costs most. regrow's
download holds the sha256 that it checks on the way in, as `store.view` does; hashing before an upload is part of making
an artifact and is told by itself. One side's copies are removed before the other's turn, so the folder for temporary
files (TMPDIR) needs room for three: the source, the server's and the download.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import s3fs

from stages.identity import File, Tree, sha256_file
from stages.objects import blob_path
from stages.store import Store, open_store
from tests.conftest import ADMIN, SeaweedFS, free_ports


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(gigabytes: float, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        (home / "server").mkdir()
        server = SeaweedFS(home / "server", free_ports(5))
        server.start()
        try:
            compare(home, server.endpoint, gigabytes, rounds)
        finally:
            server.kill()


def compare(home: Path, endpoint: str, gigabytes: float, rounds: int) -> None:
    names = {"AWS_ACCESS_KEY_ID": ADMIN[0], "AWS_SECRET_ACCESS_KEY": ADMIN[1], "AWS_ENDPOINT_URL": endpoint}
    os.environ |= {**names, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    fs.call_s3("create_bucket", Bucket="transfer")
    store = open_store("s3://transfer/store", home / "cache")
    source, size = home / "model.safetensors", int(gigabytes * 1e9)
    with source.open("wb") as file:
        for _ in range(size // 2**20 + 1):
            file.write(os.urandom(2**20))
        file.truncate(size)
    hashing: list[float] = [timed(lambda: sha256_file(source))]
    sha256 = sha256_file(source)
    tree = Tree((File("model.safetensors", size, sha256),))
    works = {
        "s3fs put": lambda: fs.put_file(str(source), "transfer/plain"),
        "s3fs get": lambda: fs.get_file("transfer/plain", str(home / "plain")),
        "regrow upload": lambda: store.objects.upload(source, blob_path(sha256), sha256),
        "regrow view": lambda: viewed(store, tree),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds):
        for name in list(works) if turn % 2 == 0 else ["regrow upload", "regrow view", "s3fs put", "s3fs get"]:
            times[name].append(timed(works[name]))
            shutil.rmtree(home / "cache" / "verified", ignore_errors=True)
            if name in ("s3fs get", "regrow view"):
                (home / "plain").unlink(missing_ok=True)
                fs.call_s3("delete_bucket", Bucket="transfer")  # with all in it: an object's room is freed much later
                fs.call_s3("create_bucket", Bucket="transfer")
    print(f"{gigabytes:g} GB, {rounds} rounds, median and each; hashing once {hashing[0]:.1f} s")
    for name, taken in times.items():
        each = " ".join(f"{t:.1f}" for t in taken)
        print(f"{name:14} {size / 1e6 / statistics.median(taken):7.0f} MB/s   {each}")
    for ours, theirs in (("regrow upload", "s3fs put"), ("regrow view", "s3fs get")):
        ratios = [t / o for o, t in zip(times[ours], times[theirs], strict=True)]
        print(f"{ours} reaches {statistics.median(ratios):.0%} of {theirs} ({' '.join(f'{r:.0%}' for r in ratios)})")


def viewed(store: Store, tree: Tree) -> None:
    """Downloaded and checked; then forgotten, for the next round."""
    with store.hold() as hold:
        view = store.view(tree, hold)
        assert (view / "model.safetensors").stat().st_size == tree.size
    for folder in (store.cache / "views", store.cache / "blobs"):
        for place, _, _ in os.walk(folder):
            Path(place).chmod(0o755)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
