"""regrow's preparation, stage by stage: `python -m benchmarks.data_regrow RECIPE STORE [STAGE ...]`.

The stages as `regrow run RECIPE +pack` makes them, without the Prefect server that follows a run. Prints as JSON what
came out, the seconds of each stage and the memory of its largest process.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

PREPARATION = ("fetch", "convert", "tokenize", "pack")


def main() -> None:
    """Make what is not there yet."""
    recipe, store, *stages = sys.argv[1:]
    started = time.perf_counter()
    os.environ.update(REGROW_STORE=f"{store}/store", REGROW_CACHE=f"{store}/cache")

    from flows.execute import execute
    from flows.recipe import load
    from flows.run import start
    from stages.runtime import from_environment
    from stages.store import open_store

    runtime = from_environment()
    run = start(load(Path(recipe), ()), runtime, open_store(runtime.store, runtime.cache))
    told: dict[str, Any] = {"stages": {}, "peaks": {}, "cached": []}
    for stage in PREPARATION:
        before = time.perf_counter()
        built = execute(run, stage)
        told["stages"][stage] = round(time.perf_counter() - before, 2)
        told["peaks"][stage] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
        told["cached"] += [stage] if built.hit else []
        if stage == (stages or PREPARATION)[-1]:
            break
    told["seconds"] = time.perf_counter() - started
    for stage in ("tokenize", "pack"):
        if stage in run.artifacts:
            told[stage] = dict(run.artifacts[stage].facts)
            told[f"{stage}_bytes"] = sum(file.size for file in run.artifacts[stage].tree.files)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
