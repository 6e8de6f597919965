"""The graph: the stages, what each reads of which, and dbt's selectors over it.

    fetch -> convert -> tokenize -> pack [-> score] -> train -> merge -> evaluate -> publish

Selectors: `train`, `train+` (and all below), `+evaluate` (and all above), `1+train+2` (so many levels), lists with
commas or spaces, `--exclude` with the same grammar.
"""

import difflib
import importlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages import objectives
from stages.errors import UserError
from stages.identity import Tree
from stages.stage import Stage

ORDER = ("fetch", "convert", "tokenize", "pack", "score", "train", "merge", "evaluate", "publish")
"""All stages. Which of them a recipe has is said by `Run.stages`: score is there only for an objective that compares
with the model before training, or learns from a teacher."""

TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True)
class Take:
    """What a stage takes of another's artifact. Only these files enter its key."""

    stage: str
    select: Callable[[Tree], Tree] = lambda tree: tree
    wanted: Callable[[Any], bool] = lambda config: True
    """Whether a stage with that config reads it. Where it does not, there is no such input."""
    named: Callable[[Any], Collection[str]] | None = None
    """Of a folder of things by name: which of them the config asks for; there is no such input where that is none."""

    def asked(self, config: Any) -> bool:
        """Whether a stage with that config reads it at all."""
        return self.wanted(config) and (self.named is None or bool(self.named(config)))

    def of(self, tree: Tree, config: Any) -> Tree:
        """What a stage with that config reads of the artifact."""
        found = self.select(tree)
        return found if self.named is None else found.select(*(f"{name}/*" for name in sorted(self.named(config))))


def _model(tree: Tree) -> Tree:
    return tree.folder("model")


def _teacher(tree: Tree) -> Tree:
    return tree.folder("teacher")


def _taught(config: Any) -> bool:
    """Whether an objective has the teacher beside the model while it trains."""
    online = objectives.find(config.objective).online
    return online is not None and online.teacher


def _reward_models(tree: Tree) -> Tree:
    return tree.folder("reward_models")


def _asked_to_judge(config: Any) -> Collection[str]:
    asked: Mapping[Any, str] = config.reward_models
    return set(asked.values())


def _templates(tree: Tree) -> Tree:
    """What the model is to be asked through: the chat template, and what closes the steps that it judges."""
    return tree.select("*/chat_template.jinja", "*/step_separator.json")


def _templated(tree: Tree) -> Tree:
    return tree.select("*/chat_template.jinja")


def _writes(config: Any) -> bool:
    """Whether an objective has the model write completions, which end where a turn of the chat template does."""
    return objectives.find(config.objective).online is not None


def _tokenizer(tree: Tree) -> Tree:
    return _model(tree).select(*TOKENIZER_FILES, "config.json")  # which says what kind of tokenizer it is


def _tokenizer_without_template(tree: Tree) -> Tree:
    """What pack shows its samples with: their template is applied already."""
    files = _tokenizer(tree)
    templates = files.select("chat_template*").files
    return Tree(tuple(file for file in files.files if file not in templates))


def _data(tree: Tree) -> Tree:
    return tree.folder("data")


def _conversations(tree: Tree) -> Tree:
    return tree.select("*/conversations.arrow", "*/counts.json")


def _tokens(tree: Tree) -> Tree:
    return tree.select("*/tokens.arrow")


WIRING: Mapping[str, Mapping[str, Take]] = {
    "fetch": {},
    "convert": {"rows": Take("fetch", _data), "tokenizer": Take("fetch", _tokenizer)},
    "tokenize": {"conversations": Take("convert", _conversations), "tokenizer": Take("fetch", _tokenizer)},
    "pack": {
        "spans": Take("tokenize", lambda tree: tree.select("*/spans.arrow", "*/counts.json")),
        "tokens": Take("tokenize", _tokens),
        "tokenizer": Take("fetch", _tokenizer_without_template),
    },
    "score": {
        "model": Take("fetch", _model),
        "teacher": Take("fetch", _teacher),
        "tokens": Take("tokenize", lambda tree: tree.select("*/tokens.arrow", "*/counts.json")),
    },
    "train": {
        "model": Take("fetch", _model),
        "tokens": Take("tokenize", _tokens),
        "plan": Take("pack"),
        "reference": Take("score"),
        "teacher": Take("fetch", _teacher, _taught),
        "reward_models": Take("fetch", _reward_models, named=_asked_to_judge),
        "templates": Take("convert", _templated, _writes),
    },
    "merge": {
        "model": Take("fetch", _model),
        "trained": Take("train"),
        "templates": Take("convert", _templates),
    },
    "evaluate": {
        "base": Take("fetch", _model),
        "weights": Take("merge"),
        "rows": Take("fetch", _data),
        "plan": Take("pack"),
        "reward_models": Take("fetch", _reward_models, named=_asked_to_judge),
    },
    "publish": {"weights": Take("merge"), "scores": Take("evaluate"), "plan": Take("pack")},
}


def stage_named(name: str) -> Stage[Any]:
    """The stage's declaration."""
    stage: Stage[Any] = importlib.import_module(f"stages.{name}").STAGE
    return stage


def upstream(name: str) -> list[str]:
    """The stages that a stage reads from directly, in order."""
    return [s for s in ORDER if s in {take.stage for take in WIRING[name].values()}]


def downstream(name: str) -> list[str]:
    """The stages that read from it directly, in order."""
    return [s for s in ORDER if name in upstream(s)]


def select(selectors: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """The selected stages in order; no selector means all. Raises UserError for what does not parse."""
    chosen = _union(selectors) if selectors else set(ORDER)
    return [s for s in ORDER if s in chosen - _union(exclude)]


def _union(selectors: Sequence[str]) -> set[str]:
    return {s for text in selectors for one in _each(text) for s in _one(one)}


def _each(text: str) -> list[str]:
    """The selectors of a list with commas or spaces between. One without any would select nothing, and be a success."""
    found = [one for one in re.split(r"[,\s]+", text) if one]
    if not found:
        raise UserError(f"selector `{text}`: names no stage; leave it out for all of them (is a variable empty?)")
    return found


def _one(selector: str) -> set[str]:
    match = re.fullmatch(r"(?P<above>\d*\+)?(?P<stage>[a-z]+)(?P<below>\+\d*)?", selector)
    if not match:
        raise UserError(f"selector `{selector}`: expected STAGE, STAGE+, +STAGE or 1+STAGE+2")
    stage = match["stage"]
    if stage not in ORDER:
        near = difflib.get_close_matches(stage, ORDER, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"the stages are {', '.join(ORDER)}"
        raise UserError(f"selector `{selector}`: no stage is called `{stage}`; {hint}")
    return {
        stage,
        *_reach(stage, upstream, match["above"]),
        *_reach(stage, downstream, match["below"]),
    }


def _reach(stage: str, step: Callable[[str], list[str]], count: str | None) -> set[str]:
    """Stages within so many steps; a bare `+` means however many."""
    if count is None:
        return set()
    levels = int(count.strip("+")) if count.strip("+") else len(ORDER)
    found: set[str] = set()
    edge = {stage}
    for _ in range(levels):
        edge = {s for one in edge for s in step(one)} - found
        found |= edge
    return found
