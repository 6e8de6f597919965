"""The Jinja sandbox in which chat templates run: what transformers offers them, with origins kept.

Same block trimming, loop controls, `tojson`, `raise_exception` and `{% generation %}` as in transformers, so a
template writes the same text. Filters, `~` and method calls that would turn a `Traced` string into a plain one raise
`Untraceable`. The date is given, never read from the clock, and nothing random is offered.

A template may come from anywhere, so what it does is bounded: steps of loops and macros, and the size of what it
builds. The bounds are counts and not seconds, so that a slow machine refuses nothing that a fast one takes.
"""

import functools
import re
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

STEPS, STEPS_A_TEXT = 1_000_000, 10_000
"""Steps of loops and macros that one render may take: these many, and so many more for each text of the row."""
LARGEST = 1 << 26
"""Characters of a text that a template may build; an item of a list counts as 16."""
WIDEST = 1 << 16
"""Width, count or power that a template may ask an operation for."""


class TooMuch(jinja2.TemplateError):
    """The template does more than it may. The text goes after "the chat template"."""


class _Code(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b`, joined by the environment so that origins are kept."""
        self.write("environment.concat((")
        for item in node.nodes:
            self.write("str(")
            self.visit(item, frame)
            self.write("),")
        self.write("))")

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        """`a + b`, measured where neither is a constant: what doubles itself has no end."""
        if isinstance(node.left, nodes.Const) or isinstance(node.right, nodes.Const):
            super().visit_Add(node, frame)
            return
        self.write("environment.sum(")
        self.visit(node.left, frame)
        self.write(", ")
        self.visit(node.right, frame)
        self.write(")")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` only marks what the assistant says; our spans know that already."""

    tags = {"generation"}  # noqa: RUF012 - the extension's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _concat(parts: Iterable[str]) -> str:
    parts = list(parts)
    _bounded(sum(map(len, parts)))
    return traced.concat(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    concat = staticmethod(_concat)
    intercepted_binops = frozenset({"*", "**", "%"})
    steps = STEPS

    @property
    def step(self) -> None:
        """Counts one; the code of every loop and macro begins with it."""
        self.steps -= 1
        if self.steps < 0:
            raise TooMuch("takes too many steps: it may loop for ever")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        for block in parsed.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            body: list[nodes.Node] = block.body  # type: ignore[attr-defined]
            body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("step"), lineno=block.lineno))
        return parsed

    def sum(self, left: Any, right: Any) -> Any:
        """`left + right`, if that is no larger than it may be."""
        if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _bounded(_size(left) + _size(right))
        return left + right

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`*`, `**` and `%`, which can make much of little."""
        if operator == "**":
            _narrow(right)
            _narrow(abs(left) if isinstance(left, int) else left)
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    _bounded(_size(one) * other)
            if isinstance(left, int) and isinstance(right, int):
                _narrow(left.bit_length() + right.bit_length())
        elif isinstance(left, str):
            _narrow_layout(left)
        return super().call_binop(context, operator, left, right)

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str):
            _narrow(*args)
            if __obj.__name__.startswith("format"):
                _narrow_layout(owner)
            elif __obj.__name__ == "join" and len(args) == 1:
                args = ([*args[0]],)
                _bounded(len(owner) * len(args[0]) + sum(map(len, args[0])))
            elif __obj.__name__ == "replace" and len(args) > 1 and isinstance(args[1], str):
                _bounded(len(owner) + owner.count(str(args[0])) * len(args[1]))
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


def begin(template: jinja2.Template, texts: int) -> None:
    """Allow a template of this sandbox the steps of one render with so many texts in it."""
    template.environment.steps = STEPS + STEPS_A_TEXT * texts  # type: ignore[attr-defined]


def _size(value: str | list[Any] | tuple[Any, ...]) -> int:
    return len(value) if isinstance(value, str) else 16 * len(value)


def _bounded(size: int) -> None:
    if size > LARGEST:
        raise TooMuch(f"builds something of {size} characters or items: expected at most {LARGEST}")


def _narrow(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and value > WIDEST:
            raise TooMuch(f"asks an operation for {value}: expected at most {WIDEST}")


_WIDTH = re.compile(r"\d{6,}")


def _narrow_layout(layout: str) -> None:
    if "*" in layout or _WIDTH.search(layout):
        raise TooMuch("formats something into too large a width")


def environment(today: date | None = None) -> jinja2.Environment:
    """A fresh sandbox. Templates that ask for the date get `today`; without one they find no `strftime_now`."""
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    for name in ("random", "pprint", "urlize"):
        del made.filters[name]
    made.filters = {name: _watched(name, found) for name, found in made.filters.items()}
    made.filters["join"] = _join
    made.filters["replace"] = _replace
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
        _narrow(*args[1:], *kwargs.values())
        if name == "format" and isinstance(args[0], str):
            _narrow_layout(args[0])
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


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(value)
    _bounded(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [item[attribute] if isinstance(item, dict) else getattr(item, str(attribute)) for item in items]
    texts = [str(item) for item in items]
    _bounded(len(str(d)) * len(texts) + sum(map(len, texts)))
    return traced.join(str(d), texts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _narrow(indent)
    return traced.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
