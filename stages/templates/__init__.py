"""Named chat templates: one file each, and the file's name is the name in the recipe (`convert.template: chatml`).

To add one, drop a file here with `TEMPLATE = Named(version=1, text=...)`.
"""

import difflib
import importlib
import pkgutil
from dataclasses import dataclass

from stages.errors import UserError


@dataclass(frozen=True)
class Named:
    """A chat template. `version` is bumped with its text."""

    version: int
    text: str
    """Jinja, as tokenizers have it."""


def names() -> list[str]:
    """The templates there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Named:
    """The template called `name`. Raises UserError with the choices."""
    if name not in names():
        near = difflib.get_close_matches(name, [*names(), "tokenizer"], 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"there is no template {name!r}: expected tokenizer, {', '.join(names())}, or Jinja text.{hint}"
        )
    found = importlib.import_module(f"{__name__}.{name}").TEMPLATE
    assert isinstance(found, Named), f"stages/templates/{name}.py must define TEMPLATE"
    return found
