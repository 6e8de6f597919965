"""A stage that does without pandas: it tells whether pyarrow found it all the same."""

import sys
from collections.abc import Mapping
from pathlib import Path

from stages.stage import Facts, Stage, StageConfig, Work


class LeanConfig(StageConfig):
    """Nothing to choose."""


def run(config: LeanConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    import pyarrow as pa

    values = pa.array(["a", "b"]).to_pylist()
    (output / "values.txt").write_text("".join(values))
    return {"pandas": "pandas" in sys.modules}


STAGE = Stage(
    "lean", artifact="values", version=1, config=LeanConfig, run=run, without=("pandas",), module="lean_stage"
)
