"""Tables in docs/ that are made from the code, between `<!-- NAME -->` and `<!-- end -->`.

`UPDATE_DOCS=1 python -m pytest FILE` writes those that FILE looks at.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

Schema = Mapping[str, Any]
Field = tuple[str, str, str, str]
"""A field's dotted key, default, what it may be, and meaning."""

KINDS = {
    "boolean": "`true`, `false`",
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "object": "mapping",
}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
INTERNAL = {"code"}
"""Fields that no recipe has: what stands in a file of the user's own is read into them."""


def check(page: Path, name: str, content: str, test: str) -> None:
    """The page holds `content` under that name; with UPDATE_DOCS set it is written there."""
    text = page.read_text("utf-8")
    assert f"<!-- {name} -->\n" in text, f"{page.name} has no place for {name}"
    now = re.sub(
        rf"(<!-- {name} -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{content}\n\n{found[2]}",
        text,
        flags=re.S,
    )
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(now, "utf-8")
        return
    assert text == now, f"run UPDATE_DOCS=1 python -m pytest {Path(test).relative_to(page.parents[1])}"


def table(*rows: Collection[str]) -> str:
    """Rows of cells, the first of them the head."""
    head, *body = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    return "\n".join((head, re.sub(r"[^|]+", " --- ", head), *body))


def fields(model: type[BaseModel], without: Collection[str] = ()) -> Iterator[Field]:
    """Every field of a settings class, and those below it."""
    schema = model.model_json_schema()
    yield from _fields(schema, schema.get("$defs", {}), "", set(without) | INTERNAL)


def _fields(schema: Schema, known: Schema, prefix: str, without: Collection[str]) -> Iterator[Field]:
    for name, field in schema.get("properties", {}).items():
        if name in without:
            continue
        default = "required" if name in schema.get("required", ()) else _shown(field.get("default"))
        yield f"{prefix}{name}", default, _kinds(field, known), " ".join(field["description"].split())
        for below, step in _models(field, known):
            yield from _fields(below, known, f"{prefix}{name}.{step}", without)


def _models(field: Schema, known: Schema) -> Iterator[tuple[Schema, str]]:
    """The settings classes in a field, each with what stands before their fields' names."""
    for one in (field, *field.get("anyOf", ())):
        if "$ref" in one:
            yield _found(one, known), ""
        below = one.get("additionalProperties")
        if isinstance(below, Mapping) and "$ref" in below:
            yield _found(below, known), "NAME."


def _found(field: Schema, known: Schema) -> Schema:
    found: Schema = known[field["$ref"].rpartition("/")[2]]
    return found


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _kinds(field: Schema, known: Schema) -> str:
    """What a field may be, in words."""
    several = [one for one in field.get("anyOf", ()) if one.get("type") != "null"]
    if several:
        return " or ".join(dict.fromkeys(_kinds(one, known) for one in several))
    if "$ref" in field:
        return _kinds(_found(field, known), known)
    if "const" in field:
        return _shown(field["const"])
    if "enum" in field:
        return ", ".join(map(_shown, field["enum"]))
    if field["type"] == "array":
        return f"list of {_kinds(field['items'], known)}"
    bounds = ", ".join(f"{word} {field[bound]:g}" for bound, word in BOUNDS.items() if bound in field)
    return f"{KINDS[field['type']]} ({bounds})" if bounds else KINDS[field["type"]]
