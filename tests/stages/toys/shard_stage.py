"""A mapped stage for the tests of building: upper-cases every file of its input, each file a part."""

from collections.abc import Mapping, Sequence
from pathlib import Path

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
    (output / "upper.txt").write_text(source.read_text().upper() + config.suffix)
    with (work.runtime.cache / "calls").open("a") as log:
        log.write(f"{source.name}\n")
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
