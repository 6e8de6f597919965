"""What a recipe chooses by the name of a file in a folder of ours, or as a Python file of the user's own: a reward, an
environment.

`what` is the word for it in messages; `package` the module of the folder.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import ValidationError

from stages import own_code
from stages.errors import UserError
from stages.stage import StageConfig

T = TypeVar("T")
OWN = "own"
"""What stands in the name's place for a file of the user's own."""


def with_own_code(values: Any, key: str, what: str) -> Any:
    """A path under `key` becomes the file's text, under `code`, which enters the key of a stage in its place.

    Raises ValueError when it cannot be read.
    """
    named = values.get(key) if isinstance(values, Mapping) else None
    if isinstance(named, str) and named.endswith(".py") and not values.get("code"):
        try:
            return {**values, key: OWN, "code": own_code.read(named, what)}
        except UserError as error:
            raise ValueError(str(error)) from None
    return values


def fitted(name: str, options: type[StageConfig], given: Mapping[str, Any]) -> dict[str, Any]:
    """What `name` is told, defaults filled in. Raises ValueError naming the first that does not fit."""
    try:
        return options.model_validate(given).model_dump(mode="json")
    except ValidationError as error:
        told = error.errors()[0]
        raise ValueError(f"{name}: {'.'.join(map(str, told['loc']))}: {told['msg']}") from None


@cache
def names(package: str) -> tuple[str, ...]:
    """The files in the folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)))


def find(package: str, name: str, what: str, kind: type[T]) -> T:
    """What the file of that name declares under `what` in capitals. Raises UserError listing the choices."""
    known = names(package)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"there is no {what} {name!r}: {hint}There are {', '.join(known)}, and paths of your own .py")
    found = getattr(importlib.import_module(f"{package}.{name}"), what.upper())
    assert isinstance(found, kind)
    return found
