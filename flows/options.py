"""What every command of `regrow` takes: its options, the runtime they make, and where it prints."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from flows.strict_yaml import parse
from stages.errors import UserError
from stages.runtime import Runtime, from_environment

StoreUrl = Annotated[str | None, typer.Option("--store", help="The artifact store: a folder or an fsspec URL.")]
RuntimeFile = Annotated[Path | None, typer.Option("--runtime", help="A YAML file with runtime settings.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

console = Console(highlight=False)


def runtime_of(store: str | None, file: Path | None, allow_code: bool = False) -> Runtime:
    """Flags over file over environment over defaults. Raises UserError for what is no runtime."""
    found = _read(file) if file is not None else {}
    if store is not None:
        found["store"] = store
    if allow_code:
        found["allow_code"] = True
    try:
        return from_environment(found)
    except ValidationError as error:
        told = error.errors()
        name = str(told[0]["loc"][0])  # what follows are pydantic's names of the types that it may have
        wanted = "; or: ".join(dict.fromkeys(each["msg"] for each in told if str(each["loc"][0]) == name))
        wanted = wanted.removeprefix("Value error, ")
        raise UserError(f"runtime `{name}`: {wanted} (from {file or f'REGROW_{name.upper()}'})") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a runtime file: {' '.join(str(error).split())}") from None
    found = parse(text, str(file)).value
    if not isinstance(found, dict | None):
        raise UserError(f"{file}: not a runtime file: expected settings by name, such as `store: s3://bucket/prefix`")
    return found or {}
