"""The recipe: one YAML file, one section a stage.

Each section's model stands in its stage's file; this module only composes them, checks what concerns two sections,
and turns every mistake into one line: file, line, key, what was expected, the nearest valid name.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from flows.sections import across_sections
from flows.strict_yaml import Document, parse
from stages.convert import ConvertConfig
from stages.errors import UserError
from stages.evaluate import EvaluateConfig
from stages.fetch import FetchConfig
from stages.merge import MergeConfig
from stages.pack import PackConfig
from stages.publish import PublishConfig
from stages.score import ScoreConfig
from stages.stage import StageConfig
from stages.tokenize import TokenizeConfig
from stages.train import TrainConfig

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class Recipe(StageConfig):
    """A fine-tuning pipeline, from sources to a published model."""

    name: Name
    """What this pipeline is called: lower-case letters, digits and dashes. Refs and runs are kept under it."""
    fetch: FetchConfig
    """The base model and the data."""
    convert: ConvertConfig = Field(default_factory=ConvertConfig)
    """Rows to conversations, rendered with the chat template."""
    tokenize: TokenizeConfig = Field(default_factory=TokenizeConfig)
    """Conversations to token ids."""
    pack: PackConfig = Field(default_factory=PackConfig)
    """What trains, and how it is packed into sequences and steps."""
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    """What the model before training gives every token, for objectives that compare with it."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The objective, the adapter and the optimizer."""
    merge: MergeConfig = Field(default_factory=MergeConfig)
    """The adapter into the base model's weights, with a check."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """What the tuned model must show against the base model."""
    publish: PublishConfig = Field(default_factory=PublishConfig)
    """Where the model goes, and the gate before it."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_under_a_heading(cls, values: Any) -> Any:
        """YAML has null where all lines of a section are commented out."""
        if not isinstance(values, Mapping):
            return values
        return {name: v for name, v in values.items() if v is not None or name not in cls.model_fields}


class Loaded(BaseModel):
    """A recipe with the text it came from."""

    recipe: Recipe
    text: str
    path: str
    settings: tuple[str, ...] = ()
    """The `a.b=value` settings that it has beside what the file says."""
    run: str = ""
    """The run whose recipe it is, where a name was asked for."""


def load(path: Path, settings: Sequence[str] = ()) -> Loaded:
    """Read a recipe file and apply `a.b=value` settings. Raises UserError, all mistakes in one message."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise UserError(f"{path}: no such recipe file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe: {error}") from None
    return loads(text, str(path), settings)


def loads(text: str, path: str, settings: Sequence[str] = ()) -> Loaded:
    """A recipe from its YAML text; `path` is what messages call it. Raises UserError, all mistakes in one message."""
    document = parse(text, path)
    value = {} if document.value is None else document.value
    if not isinstance(value, dict):
        raise UserError(f"{path}:1: a recipe is a mapping of sections (name, fetch, …)")
    for setting in settings:
        value = _with_setting(value, setting)
    overridden = {s.partition("=")[0] for s in settings}
    recipe = check(value, document, path, overridden)
    # With settings the file no longer says what runs, and what is recorded and published must.
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True) if settings else text
    return Loaded(recipe=recipe, text=text, path=path, settings=tuple(settings))


def check(value: Any, document: Document, name: str, overridden: set[str] = frozenset()) -> Recipe:  # type: ignore[assignment]
    """Validate a parsed recipe. Raises UserError with one line a mistake."""
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        told = [_told(e, document, name, overridden) for e in error.errors()]
        raise UserError("\n".join(dict.fromkeys(told))) from None
    across = list(across_sections(recipe))
    if across:
        places = [f"{_place(path, document, name, overridden)}: {message}" for path, message in across]
        raise UserError("\n".join(places))
    return recipe


def _with_setting(value: dict[str, Any], setting: str) -> dict[str, Any]:
    """`a.b=c` applied to a copy; `c` is read as YAML."""
    dotted, equals, text = setting.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {setting}: expected KEY=VALUE with a dotted key, e.g. train.learning_rate=2e-4")
    try:
        leaf = parse(text, "").value
    except UserError as error:  # which begins with the line
        raise UserError(f"--set {setting}: {str(error).partition(': ')[2]}") from None
    copy: dict[str, Any] = dict(value)
    inner = copy
    for key in keys[:-1]:
        below = inner.get(key)
        if below is not None and not isinstance(below, dict):
            raise UserError(f"--set {setting}: {key} is not a section")
        inner[key] = dict(below or {})
        inner = inner[key]
    inner[keys[-1]] = leaf
    return copy


def _told(error: Mapping[str, Any], document: Document, name: str, overridden: set[str]) -> str:
    """One line for one pydantic error."""
    path = tuple(k for k in error["loc"] if not _is_tag(k))
    place = _place(path, document, name, overridden)
    dotted = ".".join(map(str, path))
    kind, wanted = error["type"], error["msg"]
    if kind == "extra_forbidden":
        choices = sorted(_fields_at(Recipe, path[:-1]))
        near = difflib.get_close_matches(str(path[-1]), choices, 1, cutoff=0.6)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(choices) or 'none'}"
        return f"{place}: unknown key `{dotted}`; {hint}"
    if kind == "missing":
        return f"{place}: `{dotted}` is missing"
    if kind == "value_error":
        return f"{place}: `{dotted}`: {wanted.removeprefix('Value error, ')}"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        known, around = (_fields_at(Recipe, at) for at in (path, path[:-1]))
        keys = f"{{{', '.join(sorted(known))}}}"
        named = f"expected {{NAME: {keys if known != around else 'VALUE'}, ...}}"
        wanted = named if kind == "dict_type" else f"expected some of {keys}"
    elif kind in ("tuple_type", "list_type"):
        wanted = "expected a list"
    elif path == ("name",) and kind == "string_pattern_mismatch":
        wanted = "expected small letters, digits and hyphens, 63 at most, no hyphen first"
    given = error.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{place}: `{dotted}`: {wanted[:1].lower()}{wanted[1:]}{shown}"


def _is_tag(key: object) -> bool:
    """Pydantic puts the names of union members and validators into a location, such as `function-after[fit(), str]`;
    they are no keys of the file."""
    return isinstance(key, str) and re.fullmatch(r"[a-z-]*\[.*\]", key) is not None


def _place(path: tuple[str | int, ...], document: Document, name: str, overridden: set[str]) -> str:
    dotted = ".".join(map(str, path))
    if any(dotted == s or dotted.startswith(f"{s}.") for s in overridden):
        return f"--set {dotted}"
    line = document.line(path)
    below = [f"--set {s}" for s in sorted(overridden) if not dotted or s.startswith(f"{dotted}.")]
    return " with ".join([f"{name}:{line}" if line else name, *below])


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> set[str]:
    """The valid keys of the mapping at `path`."""
    models = {model}
    for key in path:
        below: set[type[BaseModel]] = set()
        for one in models:
            if isinstance(key, str) and key in one.model_fields:
                below |= set(_models_in(one.model_fields[key].annotation))
        models = below or models
    return {name for one in models for name in one.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model class that a type annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _models_in(argument)
