"""A stage with a streamed input for the tests: reads folder after folder and writes what was there each time."""

import json
from collections.abc import Mapping
from pathlib import Path

from stages.stage import Facts, Stage, StageConfig, Work


class StreamConfig(StageConfig):
    """The folders, in the order in which they are asked for."""

    order: tuple[str, ...]


def run(config: StreamConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    seen = []
    for number, name in enumerate(config.order):
        work.show("rows", [name], config.order[number + 1 : number + 2])
        there = sorted(path.relative_to(inputs["rows"]).as_posix() for path in inputs["rows"].glob("*/*/rows.txt"))
        read = (inputs["rows"] / name / "rows.txt").read_text()
        cached = sum(path.is_file() for path in (work.runtime.cache / "blobs").rglob("*"))
        seen.append({"read": read, "there": there, "cached": cached, "kept": (inputs["kept"] / "kept.txt").read_text()})
    (output / "seen.json").write_text(json.dumps(seen))
    return {}


STAGE = Stage(
    "stream",
    artifact="seen",
    version=1,
    config=StreamConfig,
    run=run,
    streamed=frozenset({"rows"}),
    module="stream_stage",
)
