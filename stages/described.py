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

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Described(BaseModel):
    """A model in whose JSON schema and forms each field is called as in YAML and described by its docstring."""

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
