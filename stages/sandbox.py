"""The Jinja sandbox in which chat templates run: what transformers offers them, with origins kept.

Same block trimming, loop controls, `tojson`, `raise_exception` and `{% generation %}` as in transformers, so a
template writes the same text. Filters, `~` and method calls that would turn a `Traced` string into a plain one raise
`Untraceable`. The date is given, never read from the clock, and nothing random is offered.
"""

import functools
from collections.abc import Callable, Iterable
from datetime import date
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from stages import traced
from stages.traced import Traced, Untraceable


class _Code(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b`, joined by the environment so that origins are kept."""
        self.write("environment.concat((")
        for item in node.nodes:
            self.write("str(")
            self.visit(item, frame)
            self.write("),")
        self.write("))")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` only marks what the assistant says; our spans know that already."""

    tags = {"generation"}  # noqa: RUF012 - the extension's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    concat = staticmethod(traced.concat)

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().call(__context, __obj, *args, **kwargs)
        # A method of a plain string, given traced ones. Methods of traced strings look after themselves.
        # (The sandbox wraps `format` in a function of its own.)
        method = getattr(__obj, "__wrapped__", __obj)
        if type(getattr(method, "__self__", None)) is str and isinstance(result, str | list | tuple):
            if method.__name__ == "join" and len(args) == 1:
                return traced.join(method.__self__, list(args[0]))
            given = [*args, *(value for name, value in kwargs.items() if not name.startswith("_"))]
            if traced.holds_traced(given):
                raise Untraceable(f"it puts data into a text by .{method.__name__}()")
        return result


def environment(today: date | None = None) -> jinja2.Environment:
    """A fresh sandbox. Templates that ask for the date get `today`; without one they find no `strftime_now`."""
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    for name in ("random", "pprint", "urlize"):
        del made.filters[name]
    made.filters = {name: _watched(name, found) for name, found in made.filters.items()}
    made.filters["join"] = _join
    made.filters["tojson"] = _tojson
    made.filters["string"] = str
    made.filters["safe"] = _safe
    made.globals.pop("lipsum")
    made.globals["raise_exception"] = _raise_exception
    if today is not None:
        made.globals["strftime_now"] = today.strftime
    return made


FOLLOWED = frozenset({"capitalize", "d", "default", "first", "last", "lower", "replace", "trim", "upper"})
"""Jinja's own filters that make strings by nothing but methods of the string they get."""


def _watched(name: str, found: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(found)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = found(*args, **kwargs)
        if not isinstance(result, str) or not result or (name in FOLLOWED and isinstance(result, Traced)):
            return result
        given = (*args, *kwargs.values())
        if not any(result is value for value in given) and any(traced.holds_traced(value) for value in given):
            raise Untraceable(f"it passes data through the filter `{name}`")
        return result

    return watched


class _Safe(Traced):
    """Text marked safe: `+` would escape what it is added to as if for HTML, which nobody can want."""

    __slots__ = ()
    __add__ = __radd__ = Traced._refuse


def _safe(value: Any) -> str:
    return _Safe(value, traced.runs_of(value)) if isinstance(value, Traced) else Markup(value)


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [item[attribute] if isinstance(item, dict) else getattr(item, str(attribute)) for item in items]
    return traced.join(str(d), [str(item) for item in items])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return traced.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
