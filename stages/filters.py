"""The language of `convert.filter`: one expression over a row's fields that says which rows are kept.

    lang == "en" and score >= 0.8
    len(messages) > 1 and messages[-1].role == "assistant"
    source in ["wiki", "books"] and not startswith(text, "http")
    has(meta.tags) and "math" in meta.tags

Fields are named as they stand in the row: `meta.lang`, `messages[0].content`, and between
backquotes where they have odd signs in them. Values are text in single
or double quotes, numbers, true, false, null, and lists. Operators, the loosest first: or, and, not, then one of
== != < <= > >= in, not in. Functions: len(x), lower(x), startswith(x, y), endswith(x, y), has(field).

It is no Python: it has no names but the row's, no attributes, calls or loops of its own, so it ends after as many steps
as it has signs, each linear in the row at most. Nothing is taken for true or false but true and false, numbers and text
do not compare, and a field that a row lacks is an error unless `has` asked for it: a misspelt name keeps or drops
nothing in silence. Equality is JSON's: 1 is 1.0, and neither is true. What JSON does not have, such as a Parquet file's
dates, decimals and bytes, equals its own kind only: to ask whether it is of another, null apart, is an error.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from stages.formats import BadRow

LONGEST = 2000
"""Signs that an expression may have."""
DEEPEST = 32
"""Brackets and `not` that may stand within one another."""

Row = Mapping[str, Any]
Value = Callable[[Row], Any]


class WrongType(ValueError):
    """The expression does not apply to a row: a field is missing, or is of another kind. Says which."""


class LeftOut(NamedTuple):
    """Stands for a row that a filter does not keep."""


def filtered(rows: Iterator[tuple[str, Any]], text: str) -> Iterator[tuple[str, Any]]:
    """Rows with their places, in which those that the filter does not keep stand as `LeftOut`, and those that it does
    not apply to as `BadRow`. Without a filter they pass."""
    if not text:
        return rows
    keep = parse(text)

    def kept(row: Any) -> Any:
        if not isinstance(row, dict):
            return row
        try:
            return row if keep(row) else LeftOut()
        except (WrongType, RecursionError) as error:  # the latter from lists and objects deep within one another
            return BadRow("filter does not apply", f"the filter does not apply: {error}")

    return ((place, kept(row)) for place, row in rows)


class _Token(NamedTuple):
    kind: str
    text: str
    place: int


_TOKENS = re.compile(
    r"""(?P<space>\s+)
    |(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
    |(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<quoted>`[^`]+`)
    |(?P<name>[^\W\d]\w*)
    |(?P<sign>==|!=|<=|>=|[<>()\[\].,])""",
    re.X | re.S,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
_CONSTANTS = {"true": True, "false": False, "null": None}
_FUNCTIONS = {"len": 1, "lower": 1, "startswith": 2, "endswith": 2, "has": 1}
_COMPARISONS = ("==", "!=", "<", "<=", ">", ">=", "in", "not")
_WORDS = {"and", "or", "not", "in", *_CONSTANTS}


def parse(text: str) -> Callable[[Row], bool]:
    """The expression as a function of a row, which raises `WrongType` where it does not apply.

    Raises ValueError, saying where and what was expected, for what is no expression.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a filter has at most {LONGEST} signs, and this one {len(text)}")
    reader = _Reader(text)
    value = reader.any_of(0)
    if reader.next.kind != "end":
        raise reader.wrong("expected `and`, `or` or the end")
    return lambda row: _truth(value(row), text)


class _Reader:
    """Reads an expression from left to right, one function for each strength of binding."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = self._tokens()
        self.place = 0

    def _tokens(self) -> list[_Token]:
        found, place = [], 0
        while place < len(self.text):
            match = _TOKENS.match(self.text, place)
            if match is None:
                raise ValueError(self._at(place, f"{self.text[place]!r} means nothing here{self._hint(place)}"))
            if match.lastgroup != "space":
                found.append(_Token(str(match.lastgroup), match[0], place))
            place = match.end()
        return [*found, _Token("end", "", place)]

    def _hint(self, place: int) -> str:
        hints = {"=": "; equality is ==", "&": "; write `and`", "|": "; write `or`", "!": "; write `not`"}
        hints["-"] = "; a name with such signs stands between backquotes"
        return hints.get(self.text[place], "; is a quote missing?" if self.text[place] in "\"'" else "")

    def _at(self, place: int, what: str) -> str:
        return f"filter `{self.text}`, sign {place + 1}: {what}"

    @property
    def next(self) -> _Token:
        return self.tokens[self.place]

    def wrong(self, what: str) -> ValueError:
        found = f"`{self.next.text}`" if self.next.text else "the end"
        return ValueError(self._at(self.next.place, f"{what}, found {found}"))

    def take(self, *texts: str) -> str:
        """The next token's text if it is one of these, else nothing."""
        if self.next.kind in ("name", "sign") and self.next.text in texts:
            self.place += 1
            return self.tokens[self.place - 1].text
        return ""

    def must(self, text: str) -> None:
        if not self.take(text):
            raise self.wrong(f"expected `{text}`")

    def any_of(self, depth: int) -> Value:
        return self._joined("or", self.all_of, depth)

    def all_of(self, depth: int) -> Value:
        return self._joined("and", self.negated, depth)

    def _joined(self, word: str, part: Callable[[int], Value], depth: int) -> Value:
        parts = [part(depth)]
        while self.take(word):
            parts.append(part(depth))
        if len(parts) == 1:
            return parts[0]
        stop = word == "or"

        def joined(row: Row) -> bool:
            for value in parts:
                if _truth(value(row), f"what stands beside `{word}`") is stop:
                    return stop
            return not stop

        return joined

    def negated(self, depth: int) -> Value:
        if depth > DEEPEST:
            raise self.wrong(f"more than {DEEPEST} brackets within one another")
        if self.take("not"):
            value = self.negated(depth + 1)
            return lambda row: not _truth(value(row), "what stands behind `not`")
        return self.compared(depth)

    def compared(self, depth: int) -> Value:
        left = self.value(depth)
        sign = self.take(*_COMPARISONS)
        if sign == "not":
            self.must("in")
            sign = "not in"
        if not sign:
            return left
        right = self.value(depth)
        if self.next.text in _COMPARISONS and self.next.kind != "text":
            raise self.wrong("one comparison at a time: join two of them with `and`")
        compare = _COMPARE[sign]
        return lambda row: compare(left(row), right(row))

    def value(self, depth: int) -> Value:
        if depth > DEEPEST:
            raise self.wrong(f"more than {DEEPEST} brackets within one another")
        token = self.next
        if token.kind in ("number", "text"):
            self.place += 1
            constant = self._number(token) if token.kind == "number" else _unquoted(token.text)
            return lambda row: constant
        if token.kind == "name" and token.text in _CONSTANTS:
            self.place += 1
            fixed = _CONSTANTS[token.text]
            return lambda row: fixed
        if self.take("("):
            inner = self.any_of(depth + 1)
            self.must(")")
            return inner
        if self.take("["):
            return self.listed(depth)
        if token.kind not in ("name", "quoted") or token.text in _WORDS:
            raise self.wrong("expected a field, a value or `(`")
        self.place += 1
        if token.kind == "quoted":
            return self.field(token.text[1:-1])
        if self.next.text == "(" and self.next.kind == "sign":
            return self.call(token, depth)
        return self.field(token.text)

    def _number(self, token: _Token) -> int | float:
        number = float(token.text) if re.search("[.eE]", token.text) else int(token.text)
        if number in (float("inf"), float("-inf")):
            raise ValueError(self._at(token.place, f"{token.text} is too large a number"))
        return number

    def listed(self, depth: int) -> Value:
        values: list[Value] = []
        while not self.take("]"):
            if values:
                self.must(",")
            values.append(self.value(depth + 1))
        return lambda row: [value(row) for value in values]

    def field(self, name: str) -> Value:
        steps: list[str | int] = [name]
        while True:
            if self.take("."):
                if self.next.kind not in ("name", "quoted"):
                    raise self.wrong("expected a field's name")
                steps.append(self.next.text.strip("`"))
                self.place += 1
            elif self.take("["):
                token = self.next
                if token.kind == "number" and re.fullmatch(r"-?\d+", token.text):
                    steps.append(int(token.text))
                elif token.kind == "text":
                    steps.append(_unquoted(token.text))
                else:
                    raise self.wrong("expected a whole number or a name in quotes")
                self.place += 1
                self.must("]")
            else:
                return _Field(tuple(steps))

    def call(self, name: _Token, depth: int) -> Value:
        if name.text not in _FUNCTIONS:
            known = ", ".join(_FUNCTIONS)
            raise ValueError(self._at(name.place, f"there is no function {name.text}: known are {known}"))
        self.must("(")
        arguments = [self.value(depth + 1)]
        while self.take(","):
            arguments.append(self.value(depth + 1))
        self.must(")")
        if len(arguments) != _FUNCTIONS[name.text]:
            told = f"{name.text} takes {_FUNCTIONS[name.text]} values, not {len(arguments)}"
            raise ValueError(self._at(name.place, told))
        if name.text == "has":
            field = arguments[0]
            if not isinstance(field, _Field):
                raise ValueError(self._at(name.place, "has asks for a field, e.g. has(meta.lang)"))
            return field.there
        call = _CALLS[name.text]
        return lambda row: call(*(argument(row) for argument in arguments))


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[0]), text[1:-1], flags=re.S)


class _Field:
    """A field's value in a row."""

    def __init__(self, steps: tuple[str | int, ...]) -> None:
        self.steps = steps
        self.name = str(steps[0]) + "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps[1:])

    def __call__(self, row: Row) -> Any:
        found, ok = self._found(row)
        if not ok:
            raise WrongType(f"{self.name} is not in the row: ask with `has({self.name}) and ...` if it may be missing")
        return found

    def there(self, row: Row) -> bool:
        """Whether the row has it, be it null."""
        return self._found(row)[1]

    def _found(self, row: Row) -> tuple[Any, bool]:
        value: Any = row
        for step in self.steps:
            if isinstance(step, int):
                if not isinstance(value, list) or not -len(value) <= step < len(value):
                    return None, False
            elif not isinstance(value, Mapping) or step not in value:
                return None, False
            value = value[step]
        return value, True


_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value)) or f"a {type(value).__name__}"


def _truth(value: Any, what: str) -> bool:
    if value is not True and value is not False:
        raise WrongType(f"{what} is {_kind(value)}: expected true or false")
    return bool(value)


def _equal(a: Any, b: Any) -> bool:
    kind, other = _kind(a), _kind(b)
    if kind != other:
        # No expression can say a date: "2024-05-01" beside one is a mistake, which would keep or drop all rows.
        if a is not None and b is not None and not (type(a) in _KINDS and type(b) in _KINDS):
            raise WrongType(f"cannot compare {kind} with {other}: expected two values of one kind")
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[name]) for name, value in a.items())
    return bool(a == b)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def ordered(a: Any, b: Any) -> bool:
        kind = _kind(a)
        if kind != _kind(b) or kind not in ("a number", "text"):
            raise WrongType(f"cannot compare {kind} with {_kind(b)}: expected two numbers or two texts")
        return compare(a, b)

    return ordered


def _in(a: Any, b: Any) -> bool:
    if isinstance(b, list):
        return any(_equal(a, one) for one in b)
    if isinstance(a, str) and isinstance(b, str | dict):
        return a in b
    raise WrongType(f"cannot look for {_kind(a)} in {_kind(b)}: expected a list, or text in text or an object")


def _text(value: Any, function: str) -> str:
    if not isinstance(value, str):
        raise WrongType(f"{function} of {_kind(value)}: expected text")
    return value


def _len(value: Any) -> int:
    if not isinstance(value, str | list | dict):
        raise WrongType(f"len of {_kind(value)}: expected text, a list or an object")
    return len(value)


_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": _equal,
    "!=": lambda a, b: not _equal(a, b),
    "<": _ordered(operator.lt),
    "<=": _ordered(operator.le),
    ">": _ordered(operator.gt),
    ">=": _ordered(operator.ge),
    "in": _in,
    "not in": lambda a, b: not _in(a, b),
}
_CALLS: Mapping[str, Callable[..., Any]] = {
    "len": _len,
    "lower": lambda value: _text(value, "lower").lower(),
    "startswith": lambda value, start: _text(value, "startswith").startswith(_text(start, "startswith")),
    "endswith": lambda value, end: _text(value, "endswith").endswith(_text(end, "endswith")),
}
