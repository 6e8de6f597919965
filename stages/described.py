"""Descriptions of a settings class's fields, read from the docstrings that stand under them.

pydantic can do so itself, but then reads every class's source when it is imported: a fifth of what `regrow plan` takes.
A schema is asked for far less often.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator

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
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, body.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, inspect.cleandoc(text)
