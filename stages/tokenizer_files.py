"""A tokenizer's files: what convert needs to know of them, and what transformers makes of them."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import exact_json
from stages.errors import UserError


@dataclass(frozen=True)
class Tokenizer:
    """What convert needs to know of a tokenizer, read from its files alone."""

    template: str | None
    variables: dict[str, str]
    """Named tokens (`bos_token`, `eos_token`, ...), which templates may use."""
    special: tuple[str, ...]
    """Texts of the special tokens."""
    added: tuple[str, ...]
    """Texts of all tokens that are matched before the text is split."""
    prefix: str
    """What the tokenizer itself puts before a plain text (a begin token), else empty."""


def read_tokenizer(folder: Path, memory: Path | None = None) -> Tokenizer:
    """Read a tokenizer's files; `memory` is that of `backend`, for named tokens that only transformers knows. Raises
    UserError when `tokenizer.json` is not there, or one is not JSON, and when transformers, asked, cannot read them."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            "the model has no tokenizer.json: save one with transformers' AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...) beside its weights"
        )
    tokenizer = _json(folder / "tokenizer.json")
    config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    variables = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
    }
    if not {"bos_token", "eos_token"}.issubset(config) and not _names_are_written(folder, config):
        known = words_of(folder)
        told = json.loads(_asked(folder, memory, "names", _names))
        variables = {name: token for name, token in told.items() if name not in config and token in known} | variables
    added = tokenizer.get("added_tokens") or []
    return Tokenizer(
        template=_own_template(folder, config.get("chat_template")),
        variables=variables,
        special=tuple(token["content"] for token in added if token["special"]),
        added=tuple(token["content"] for token in added),
        prefix=_prefix(tokenizer.get("post_processor")),
    )


def refuse_other_words(teacher: Path, student: Path) -> None:
    """Raise UserError when the tokenizers of two models' folders have other tokens, or the teacher's has none."""
    if not (teacher / "tokenizer.json").is_file():
        raise UserError("fetch.teacher has no tokenizer.json: it must have the same tokenizer as fetch.model")
    theirs, ours = words_of(teacher), words_of(student)
    odd = next((word for word in sorted({*theirs, *ours}) if theirs.get(word) != ours.get(word)), None)
    if odd is not None:
        raise UserError(
            f"fetch.teacher has another tokenizer than fetch.model: {odd!r} is token {theirs.get(odd)} there and "
            f"{ours.get(odd)} here. Distil from a teacher with the same one"
        )


def words_of(folder: Path) -> dict[str, int]:
    """The tokens of a tokenizer, with their ids."""
    document = exact_json.loads((folder / "tokenizer.json").read_bytes())
    known = document["model"]["vocab"]
    known = dict(known) if isinstance(known, dict) else {word: place for place, (word, *_) in enumerate(known)}
    return known | {token["content"]: token["id"] for token in document.get("added_tokens", [])}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = exact_json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        told = f"the model's {path.name} is not JSON, or cut short: {error}"
        raise UserError(f"{told}. Copy it once more, or save the tokenizer again") from error
    return found if isinstance(found, dict) else {}


def _own_template(folder: Path, configured: Any) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    return default_template(configured)


def default_template(configured: Any) -> str | None:
    """The chat template that is asked through, of what `chat_template` says in a file of settings."""
    if isinstance(configured, list):  # several named ones, as older tokenizers have
        configured = {entry["name"]: entry["template"] for entry in configured}.get("default")
    return configured if isinstance(configured, str) else None


def _prefix(processor: Mapping[str, Any] | None) -> str:
    if not processor:
        return ""
    if processor["type"] == "Sequence":
        return "".join(_prefix(part) for part in processor["processors"])
    if processor["type"] != "TemplateProcessing":
        return ""
    texts = []
    for piece in processor["single"]:
        if "Sequence" in piece:
            break
        texts += processor["special_tokens"][piece["SpecialToken"]["id"]]["tokens"]
    return "".join(texts)


def backend(folder: Path, memory: Path) -> str:
    """`tokenizer.json` as transformers reads it, which for some model types is not what the file says.

    What transformers makes of a folder is remembered under `memory`, by the files' bytes and its version: starting
    it takes seconds. It is not asked where it saved the folder as one that it reads as it stands. Raises UserError
    when it cannot read the tokenizer, or only in its slow form.
    """
    if _as_it_stands(folder):
        return (folder / "tokenizer.json").read_text("utf-8")
    return _asked(folder, memory, "backend", lambda tokenizer: str(tokenizer.backend_tokenizer.to_str()))


def _names(tokenizer: Any) -> str:
    """The named tokens of one of transformers' tokenizers, of which its class may have some by default."""
    return json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)


def _asked(folder: Path, memory: Path | None, what: str, tell: Callable[[Any], str]) -> str:
    """What `tell` says of the tokenizer that transformers makes of a folder, remembered as `what`."""
    if memory is None:
        return tell(_loaded(folder))
    digest = hashlib.sha256(f"{what} {_transformers_version()}".encode())
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    held = memory / f"{digest.hexdigest()}.json"
    if not held.is_file():
        told = tell(_loaded(folder))
        held.parent.mkdir(parents=True, exist_ok=True)
        aside = held.with_suffix(f".{os.getpid()}")
        aside.write_text(told, "utf-8")
        aside.replace(held)
    return held.read_text("utf-8")


def _loaded(folder: Path) -> Any:
    """The tokenizer that transformers makes of a folder."""
    _transformers_version()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"transformers cannot read the model's tokenizer: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError("the model's tokenizer has only a slow form in transformers: expected a tokenizer.json")
    return tokenizer


_PLAIN_SETTINGS = {
    *("tokenizer_class", "backend", "model_max_length", "clean_up_tokenization_spaces", "chat_template"),
    *("bos_token", "eos_token", "pad_token", "unk_token", "is_local", "local_files_only", "name_or_path"),
}
"""Settings of `tokenizer_config.json` that do not change what a text is encoded as (tokens: those that are there)."""

_PLAIN_MODELS = {None, "llama", "smollm3"}
"""Model types that have no tokenizer class of their own in transformers, so that it takes the one that is named."""


def _names_are_written(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer has no class in transformers that names tokens where its files do not."""
    plain = config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return plain and _json(folder / "config.json").get("model_type") in _PLAIN_MODELS


def _as_it_stands(folder: Path) -> bool:
    """Whether transformers reads `tokenizer.json` as it stands: it was saved as of no model's own class, by version 5,
    and none of its settings changes what a text is encoded as."""
    config = _json(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") != "TokenizersBackend" or not _PLAIN_SETTINGS.issuperset(config):
        return False
    if (folder / "special_tokens_map.json").exists() or (folder / "added_tokens.json").exists():
        return False
    if _json(folder / "config.json").get("model_type") not in _PLAIN_MODELS:
        return False
    added = _json(folder / "tokenizer.json").get("added_tokens") or []
    special = {token["content"] for token in added if token["special"]}
    return all(value in special for name, value in config.items() if name.endswith("_token"))


def _transformers_version() -> str:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("tokenizing needs transformers: pip install 'regrow[train]'") from error
