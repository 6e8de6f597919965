"""Descriptions of a settings class's fields, read from the docstrings that stand under them.

pydantic can do so itself, but then reads every class's source when it is imported: a fifth of what `regrow plan` takes.
A schema is asked for far less often.
"""

import ast
import inspect
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, GetJsonSchemaHandler, ValidationInfo, field_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Described(BaseModel):
    """A model of settings in YAML: in its JSON schema and forms each field is called as there and described by its
    docstring, and no truth value is a number."""

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take it for 0 or 1."""
        if isinstance(value, bool):
            kinds = kinds_of(cls, str(info.field_name))
            if bool not in kinds and any(isinstance(k, type) and issubclass(k, int | float) for k in kinds):
                raise ValueError("expected a number, not true or false, which in YAML are also yes, no, on and off")
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler(schema)
        properties = handler.resolve_ref_schema(found).get("properties", {})
        for name in properties:
            properties[name]["title"] = name
        for kind in cls.__mro__:
            if issubclass(kind, Described):
                for name, text in _docstrings(kind):
                    if name in properties:
                        properties[name].setdefault("description", text)
        return found


def kinds_of(model: type[BaseModel], name: str) -> set[Any]:
    """The types that a field may have, one by one."""
    return {*_kinds(model.model_fields[name].annotation)}


def description_of(model: type[Described], name: str) -> str:
    """A field's description in one line; empty in code of a user's own, whose source is not there to be read."""
    known = (kind for kind in model.__mro__ if issubclass(kind, Described) and kind.__module__ in sys.modules)
    found = next((text for kind in known for field, text in _docstrings(kind) if field == name), "")
    return " ".join(found.split())


def _kinds(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        for kind in get_args(annotation):
            yield from _kinds(kind)
    else:
        yield annotation


def _docstrings(kind: type) -> Iterator[tuple[str, str]]:
    body = _classes(kind.__module__)[kind.__qualname__].body
    for statement, following in pairwise(body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, inspect.cleandoc(text)


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """A module's classes by qualified name. Its source is parsed once: `inspect.getsource` does so for each class, and
    half of the registration of all deployments went there."""
    found = {}

    def look(body: Sequence[ast.stmt], within: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[within + node.name] = node
                look(node.body, f"{within}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                look(node.body, f"{within}{node.name}.<locals>.")

    look(ast.parse(inspect.getsource(sys.modules[module])).body, "")
    return found
