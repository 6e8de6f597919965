"""What a stage is: a name, a version, a config type and a plain function.

A stage function looks like this and knows nothing of stores, keys, Prefect or other stages::

    def run(config: PackConfig, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts: ...

It reads the read-only folders in `inputs`, writes files under `output`, and returns facts: small JSON for people
and reports (counts, scores, seconds). Whatever a *later stage* needs must be a file under `output`, because facts
are not part of an artifact's digest.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import ConfigDict, ValidationInfo, field_validator, model_validator

from stages.described import Described, description_of, kinds_of
from stages.errors import UserError
from stages.identity import Action, Json, Tree
from stages.runtime import Runtime

__all__ = [
    "Facts",
    "Part",
    "Show",
    "Stage",
    "StageConfig",
    "Tell",
    "UserError",
    "Work",
    "action_of",
    "merge_facts",
    "part_action",
    "version_of",
]

Facts = dict[str, Json]


class StageConfig(Described):
    """A recipe section (or a part of one): frozen, and strict about names and nulls."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)  # which no key can say

    @model_validator(mode="before")
    @classmethod
    def _null_says_nothing(cls, values: Any) -> Any:
        """It is the same as leaving a key out where the default says nothing either; elsewhere it means "off" to who
        writes it, and the default is something else."""
        if not isinstance(values, Mapping):
            return values
        return {name: v for name, v in values.items() if v is not None or not cls._empty_by_default(name)}

    @classmethod
    def _empty_by_default(cls, name: str) -> bool:
        found = cls.model_fields.get(name)
        if found is None or found.is_required():
            return found is not None  # of a key that must be there it is missing
        return found.get_default(call_default_factory=True) in (None, "", (), {})

    @field_validator("*", mode="before")
    @classmethod
    def _no_other_null(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if value is None and type(None) not in kinds_of(cls, name):
            default = cls.model_fields[name].get_default(call_default_factory=True)
            shown = f", {json.dumps(default, default=str)}" if not isinstance(default, StageConfig) else "s"
            told = f"null is no value here; leave the key out for its default{shown}. {description_of(cls, name)}"
            raise ValueError(told.strip())
        return value


class Tell(Protocol):
    """Where a running stage reports: progress counts and, for training, metrics. Never blocks for long."""

    def __call__(self, done: float, total: float | None = None, unit: str = "", **metrics: Json) -> None:
        """Say that `done` of `total` `unit`s are finished; `metrics` are extra numbers of this moment."""


def _silent(done: float, total: float | None = None, unit: str = "", **metrics: Json) -> None:
    return None


class Show(Protocol):
    """How a stage has parts of a streamed input (`Stage.streamed`) on the disk."""

    def __call__(self, name: str, now: Collection[str], then: Collection[str] = ()) -> None:
        """Have the files of the folders `now` under `inputs[name]`, and forget what else is there. Those of `then` are
        fetched beside what the stage does next, and are there once they are asked for. Close files before."""


def _all_there(name: str, now: Collection[str], then: Collection[str] = ()) -> None:
    return None


@dataclass(frozen=True)
class Work:
    """What a running stage may use but what never enters its key."""

    folder: Path
    """Scratch that outlives attempts at the same key: resume from what is found there, never assume it is empty."""
    runtime: Runtime = field(default_factory=Runtime)
    where: Mapping[str, Json] = field(default_factory=dict)
    """Locations (paths, URLs) and lineage: what a part's `where` said, or what the flow hands to publish."""
    tell: Tell = _silent
    show: Show = _all_there


@dataclass(frozen=True)
class Part:
    """One shard of a mapped stage: an artifact of its own, listed by the stage's whole artifact."""

    name: str
    """Unique in the stage; also the folder prefix of its files in the whole, e.g. `data/chat/00003`."""
    config: Mapping[str, Json]
    """This part's own settings, all of them and nobody else's. Enters the key."""
    inputs: Mapping[str, Tree] = field(default_factory=dict)
    """The files this part reads, by input name. Their digests enter the key."""
    where: Mapping[str, Json] = field(default_factory=dict)
    """Locations. Never enters the key."""


C = TypeVar("C", bound=StageConfig)
Run = Callable[[Any, Mapping[str, Path], Path, Work], Facts]


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One stage, declared at the bottom of its file as `STAGE = Stage(...)`."""

    name: str
    """A verb: recipe section, store folder and task name alike."""
    artifact: str
    """A noun: what comes out."""
    version: int
    """Bumped when the same inputs and config would give other bytes."""
    config: type[C]
    run: Run
    """`run(config, inputs, output, work)`; for a mapped stage it is called once a part, with `part.config` parsed
    as `part`."""
    parts: Callable[[C, Mapping[str, Tree]], Sequence[Part]] | None = None
    """For a mapped stage: the parts, from config and inputs alone."""
    part: type[StageConfig] | None = None
    """The config type of one part."""
    resolve: Callable[[C, Path], Sequence[Part]] | None = None
    """For fetch, in place of `parts`: looks at the world, and remembers in a cache folder what would take long to look
    at again. Its whole is keyed by what was found (`{name: config}`), not by the recipe section, because locations
    never enter a key."""
    plugins: Callable[[Any], Mapping[str, int]] | None = None
    """The plug-ins a config uses, as `{"format:alpaca": 1}`: their versions enter the key."""
    module: str = ""
    """Where `STAGE` stands, if not in `stages.<name>`."""
    exclusive: bool = False
    """Its parts want the device or all cores for themselves: they are made one after another."""
    streamed: frozenset[str] = frozenset()
    """Inputs that may be larger than the disk: the stage gets an empty folder and says what it needs in there, by
    `Work.show`."""
    without: tuple[str, ...] = ()
    """Modules that its process does without. pyarrow asks pandas, where it is installed, whether a value is one of its
    own: importing it takes longer than a small shard."""
    libraries: tuple[str, ...] = ()
    """Distributions that shape the bytes, e.g. `("tokenizers",)`: their versions are recorded, not hashed."""
    locations: frozenset[str] = frozenset()
    """Top-level config fields that say where or when, not what, and stay out of the key (publish's destination)."""

    named: frozenset[str] = frozenset()
    """Entries of `Work.where` that are written into the artifact, and so enter the key (the name on publish's card)."""

    @property
    def home(self) -> str:
        """The module that declares this stage: the child process imports it."""
        return self.module or f"stages.{self.name}"

    def identity(self, config: StageConfig) -> dict[str, Json]:
        """The config as it enters the key: everything, defaults filled in, locations left out."""
        return config.model_dump(mode="json", exclude=set(self.locations))


def merge_facts(parts: Sequence[Facts]) -> Facts:
    """Add up the facts of a mapped stage's parts: numbers summed, dictionaries merged, lists joined, else the first."""
    merged: Facts = {}
    for facts in parts:
        for name, value in facts.items():
            merged[name] = _merged(merged[name], value) if name in merged else value
    return merged


def _merged(a: Json, b: Json) -> Json:
    if isinstance(a, bool) or isinstance(b, bool):
        return a
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a + b
    if isinstance(a, dict) and isinstance(b, dict):
        return merge_facts([a, b])
    if isinstance(a, list) and isinstance(b, list):
        return [*a, *b]
    return a


def version_of(stage: Stage[Any], config: StageConfig) -> dict[str, int]:
    """The versions that enter the key: the stage's own, and one a plug-in the config uses."""
    return {stage.name: stage.version, **(stage.plugins(config) if stage.plugins else {})}


def action_of(
    stage: Stage[Any],
    config: StageConfig,
    inputs: Mapping[str, Tree],
    parts: Sequence[Part] = (),
    where: Mapping[str, Json] | None = None,
) -> Action:
    """The action of a whole stage. `parts` are needed only where the stage resolves: they are its identity; `where`
    only for the names in `Stage.named`."""
    document = {p.name: dict(p.config) for p in parts} if stage.resolve else stage.identity(config)
    document |= {name: (where or {}).get(name) for name in sorted(stage.named)}
    return Action(stage.name, version_of(stage, config), document, {n: t.digest for n, t in inputs.items()})


def part_action(stage: Stage[Any], part: Part) -> Action:
    """The action of one part of a mapped stage."""
    assert stage.part is not None
    config = stage.part.model_validate(part.config)
    return Action(
        stage.name,
        version_of(stage, config),
        config.model_dump(mode="json"),
        {n: t.digest for n, t in part.inputs.items()},
    )
