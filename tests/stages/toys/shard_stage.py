"""A mapped stage for the tests of building: upper-cases every file of its input, each file a part.

A file that says `for ever` is never done; one that says `refused` is refused as soon as another's work has begun.
"""

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.errors import UserError
from stages.identity import Tree
from stages.stage import Facts, Part, Stage, StageConfig, Work


class ShardsConfig(StageConfig):
    """Settings of all parts."""

    suffix: str = "!"


def parts(config: ShardsConfig, inputs: Mapping[str, Tree]) -> Sequence[Part]:
    return [
        Part(file.path.removesuffix(".txt"), config.model_dump(), {"rows": inputs["rows"].select(file.path)})
        for file in inputs["rows"].files
    ]


def run(config: ShardsConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    [source] = inputs["rows"].glob("*.txt")
    calls = work.runtime.cache / "calls"
    text = source.read_text()
    while text == "refused" and not calls.exists():
        time.sleep(0.01)
    if text == "refused":
        raise UserError("this part is refused")
    with calls.open("a") as log:
        log.write(f"{source.name}\n")
    while text == "for ever":
        signal.pause()
    (output / "upper.txt").write_text(text.upper() + config.suffix)
    return {"rows": 1, "by": {source.stem: 1}}


STAGE = Stage(
    "shards",
    artifact="shards",
    version=1,
    config=ShardsConfig,
    run=run,
    parts=parts,
    part=ShardsConfig,
    module="shard_stage",
)
