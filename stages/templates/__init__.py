"""Named chat templates: one file each, and the file's name is the name in the recipe (`convert.template: chatml`).

To add one, drop a file here with `TEMPLATE = Named(version=1, text=..., ...)`; the tests find it, and `docs/formats.md`
lists it. The texts are our own writing from the formats that the models' makers published.
"""

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache

from stages.errors import UserError
from stages.home import expanded


@dataclass(frozen=True)
class Named:
    """A chat template. `version` is bumped with its text."""

    version: int
    text: str
    """Jinja, as tokenizers have it; rendered with `trim_blocks` and `lstrip_blocks`, as in transformers."""
    models: str
    """Whose published format it is."""
    tokens: tuple[str, ...]
    """Control tokens that the tokenizer must have, besides those that it names itself (`eos_token`)."""
    end: str
    """What ends the assistant's turn."""
    system: bool = True
    """Whether it takes a system turn."""
    tools: bool = False
    """Whether it takes tools on offer, tool calls and tool results. Without, it refuses them."""
    reasoning: bool = False
    """Whether it writes the assistant's reasoning, at least in answer to the last question."""


NO_TOOLS = """\
{%- if tools or messages | selectattr('tool_calls') | list or messages | selectattr('role', 'equalto', 'tool') | list %}
    {{- raise_exception('this chat template has no tools: choose one that has') }}
{%- endif %}
"""
"""The beginning of templates without tools: a row that needs them is refused, here and when the model is asked."""


@cache
def names() -> tuple[str, ...]:
    """The templates there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find(name: str) -> Named:
    """The template called `name`. Raises UserError with the choices."""
    if name not in names():
        near = difflib.get_close_matches(name, [*names(), "tokenizer"], 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"there is no template {name!r}: expected tokenizer, {', '.join(names())}, Jinja text, or the path of a "
            f"`.jinja` file.{hint}"
        )
    found = importlib.import_module(f"{__name__}.{name}").TEMPLATE
    assert isinstance(found, Named), f"stages/templates/{name}.py must define TEMPLATE"
    return found


def resolved(choice: str) -> str:
    """What a recipe's `template` stands for: `tokenizer`, a name, or Jinja text, for which a `.jinja` file is read.

    The file's text takes the place of its path, so that keys hold what the file says and not where it lies. Raises
    UserError for an unknown name and for a file that cannot be read.
    """
    if "{" in choice or choice == "tokenizer":
        return choice
    if not choice.endswith(".jinja"):
        find(choice)
        return choice
    try:
        text = expanded(choice, "template").read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no chat template file {choice}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{choice}: cannot be read as a chat template: {error}") from None
    if "{" not in text:
        raise UserError(f"{choice}: expected Jinja: it has no {{{{ … }}}} and no {{% … %}}")
    return text
