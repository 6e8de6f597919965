"""What two hundred stored runs cost: `python -m benchmarks.many_runs`.

Whole processes of `regrow plan` and `regrow history` over one recipe, beside no stored runs and beside `RUNS` of 25 kB,
on a folder and on S3 (SeaweedFS on this machine). Prints the median and the range of `TIMES` runs of each, and what the
stored runs add to the quickest (other jobs disturb the rest). Bars: plan 1 s, history 2 s.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import uuid4

from tests.conftest import ADMIN, SeaweedFS, _client, free_ports
from tests.flows.rehearsal import Rehearsal
from tests.flows.test_many_runs import RUNS, filled

TIMES = 5


def seconds(*arguments: str) -> list[float]:
    """Wall seconds of a command, several times."""
    found = []
    for _ in range(TIMES):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "flows.cli", *arguments], check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - started)
    return found


def compare(kind: str, empty: Rehearsal, full: Rehearsal) -> None:
    """A line a command: without and with the stored runs, in turns on one machine."""
    empty.run(20)
    filled(full)
    for command in ("plan", "history"):
        best = []
        for each in (empty, full):
            recipe = each.folder / "recipe.yaml"
            recipe.write_text(each.start(20).loaded.text)
            what = [str(recipe)] if command == "plan" else [each.name]
            took = seconds(command, *what, "--store", each.store.url)
            best.append(min(took))
            shown = RUNS if each is full else 0
            middle = statistics.median(took)
            print(f"{kind:<7} {command:<8} {shown:>4} runs  {middle:5.2f} s  [{min(took):.2f}, {max(took):.2f}]")
        print(f"{'':<7} {command:<8} the runs add {best[1] - best[0]:+.2f} s at best")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("weed", "one", "two", "three", "four")]
        for place in places:
            place.mkdir()
        os.environ["XDG_DATA_HOME"] = folder
        compare("folder", Rehearsal(places[1]), Rehearsal(places[2]))
        server = SeaweedFS(places[0], free_ports(5))
        try:
            server.start()
            os.environ |= {"AWS_ENDPOINT_URL": server.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}
            os.environ |= {"AWS_ACCESS_KEY_ID": ADMIN[0], "AWS_SECRET_ACCESS_KEY": ADMIN[1]}
            buckets = [f"bench-{uuid4().hex[:12]}" for _ in range(2)]
            for bucket in buckets:
                _client(server.endpoint).call_s3("create_bucket", Bucket=bucket)
            compare("s3", *(Rehearsal(p, f"s3://{b}/store") for p, b in zip(places[3:], buckets, strict=True)))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
