"""Text that remembers where each of its characters came from.

A chat template is a program over strings. Handing it `Traced` strings instead of plain ones lets one ordinary render
tell, exactly and for any template, which characters it copied from the data and which it wrote itself: every string
operation that a template can do either carries the origins along or raises `Untraceable`. None loses them silently.
"""

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, SupportsIndex

from stages.errors import UserError

TEMPLATE = -1
"""The leaf number of characters that the template wrote."""

Runs = tuple[tuple[int, int], ...]
"""(characters, leaf) from left to right. Runs of length 0 are kept: they mark the place of an empty leaf."""


class Untraceable(UserError):
    """The template did something to a string after which nobody can say where its characters came from."""


class Traced(str):
    """A string with runs. Equal to, and hashed like, the plain string."""

    __slots__ = ("_runs",)
    _runs: Runs

    def __new__(cls, text: str, runs: Runs) -> "Traced":
        """`runs` must add up to the length of `text`."""
        self = super().__new__(cls, text)
        self._runs = runs
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(self, other), _joined(self._runs, runs_of(other)))

    def __radd__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(other, self), _joined(runs_of(other), self._runs))

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                raise Untraceable("it takes every n-th character of a text")
            return self._cut(start, max(start, stop))
        index = operator.index(key)
        text = super().__getitem__(index)
        index %= len(self)
        return Traced(text, self._cut(index, index + 1)._runs)

    def __iter__(self) -> Iterator[str]:
        return (self._cut(i, i + 1) for i in range(len(self)))

    def _cut(self, start: int, stop: int) -> "Traced":
        text = str.__getitem__(self, slice(start, stop))
        if len(self._runs) == 1:
            return Traced(text, ((stop - start, self._runs[0][1]),))
        runs, at = [], 0
        for length, leaf in self._runs:
            low, high = max(start, at), min(stop, at + length)
            if low < high or (low == high and length == 0):
                runs.append((high - low, leaf))
            at += length
        return Traced(text, tuple(runs) or ((0, self._runs[0][1] if self._runs else TEMPLATE),))

    def strip(self, chars: str | None = None, /) -> str:
        start = len(self) - len(str.lstrip(self, chars))
        return self._cut(start, max(start, len(str.rstrip(self, chars))))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        return self._cut(0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.rsplit(self, sep, maxsplit), sep)

    def _pieces(self, pieces: list[str], sep: str | None) -> list[str]:
        found: list[str] = []
        at = 0
        for piece in pieces:
            # Without a separator the gap is white space, and a piece never begins with any.
            start = at if sep is not None else str.index(self, piece, at)
            found.append(self._cut(start, start + len(piece)))
            at = start + len(piece) + len(sep or "")
        return found

    def splitlines(self, keepends: bool = False) -> list[str]:
        found: list[str] = []
        at = 0
        for whole, bare in zip(str.splitlines(self, True), str.splitlines(self), strict=True):
            found.append(self._cut(at, at + len(whole if keepends else bare)))
            at += len(whole)
        return found

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._three(str.partition(self, sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._three(str.rpartition(self, sep))

    def _three(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        one, two = len(parts[0]), len(parts[0]) + len(parts[1])
        return self._cut(0, one), self._cut(one, two), self._cut(two, len(self))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            raise Untraceable("it inserts text between all characters of a text")
        pieces = self.split(old, count)
        parts: list[str] = pieces[:1]
        at = len(pieces[0])
        for piece in pieces[1:]:
            # What stands in for data counts as data.
            parts.append(new if isinstance(new, Traced) else Traced(new, ((len(new), self._leaf_at(at)),)))
            parts.append(piece)
            at += len(old) + len(piece)
        return concat(parts)

    def _leaf_at(self, index: int) -> int:
        return self._cut(index, index + 1)._runs[0][1]

    def _same_length(self, text: str) -> str:
        if len(text) != len(self):
            raise Untraceable("it changes the case of letters that change their number with it")
        return Traced(text, self._runs)

    def upper(self) -> str:
        return self._same_length(str.upper(self))

    def lower(self) -> str:
        return self._same_length(str.lower(self))

    def title(self) -> str:
        return self._same_length(str.title(self))

    def capitalize(self) -> str:
        return self._same_length(str.capitalize(self))

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise Untraceable("it formats text in a way that does not keep track of its parts")

    __mod__ = __rmod__ = __mul__ = __rmul__ = __format__ = _refuse
    format = format_map = join = translate = center = ljust = rjust = zfill = _refuse
    expandtabs = casefold = swapcase = encode = _refuse


def runs_of(text: str) -> Runs:
    """The runs of any string; a plain one came from the template."""
    return text._runs if isinstance(text, Traced) else ((len(text), TEMPLATE),) if text else ()


def concat(parts: Iterable[str]) -> str:
    """`"".join(parts)` that keeps the runs; plain when no part is traced."""
    parts = list(parts)
    text = "".join(parts)
    if not any(isinstance(part, Traced) for part in parts):
        return text
    runs: list[tuple[int, int]] = []
    for part in parts:
        more = runs_of(part)
        if runs and more and runs[-1][1] == more[0][1]:
            runs[-1] = (runs[-1][0] + more[0][0], more[0][1])
            more = more[1:]
        runs += more
    return Traced(text, tuple(runs))


def _joined(left: Runs, right: Runs) -> Runs:
    if left and right and left[-1][1] == right[0][1]:
        return (*left[:-1], (left[-1][0] + right[0][0], right[0][1]), *right[1:])
    return left + right


def join(separator: str, parts: Sequence[str]) -> str:
    """`separator.join(parts)` that keeps the runs."""
    spread: list[str] = []
    for number, part in enumerate(parts):
        spread += [separator, part] if number else [part]
    return concat(spread)


def mark(value: Any, leaf: Callable[[], int]) -> Any:
    """A JSON value with all its strings, keys too, traced; `leaf` numbers each as it comes."""
    if isinstance(value, str):
        return Traced(value, ((len(value), leaf()),))
    if isinstance(value, dict):
        return {mark(key, leaf): mark(item, leaf) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, leaf) for item in value]
    return value


def holds_traced(value: Any) -> bool:
    """Whether a value is, or directly or deeply holds, a traced string."""
    if isinstance(value, Traced):
        return True
    if isinstance(value, dict):
        return any(holds_traced(key) or holds_traced(item) for key, item in value.items())
    return isinstance(value, list | tuple) and any(holds_traced(item) for item in value)


def dumps(value: Any, *, sort_keys: bool = False, **layout: Any) -> str:
    """`json.dumps(value, sort_keys=..., **layout)` that keeps the runs of the strings inside."""
    if not holds_traced(value):
        return json.dumps(value, sort_keys=sort_keys, **layout)
    # json lays out a copy with a numbered mark in each string's place; the strings go in afterwards, escaped.
    leaves: list[Traced] = []
    plain = _MARKS.split(json.dumps(_with_marks(value, leaves, sort_keys), **layout))
    parts = [plain[0]]
    for leaf, after in zip(leaves, plain[1:], strict=True):
        parts += [_escaped(leaf, layout.get("ensure_ascii", True)), after]
    return concat(parts)


_MARKS = re.compile(r"\\u0000")


def _with_marks(value: Any, leaves: list[Traced], sort_keys: bool) -> Any:
    if isinstance(value, Traced):
        leaves.append(value)
        return _Mark("\0")
    if isinstance(value, dict):
        items = sorted(value.items()) if sort_keys else value.items()
        return {_with_marks(k, leaves, sort_keys): _with_marks(v, leaves, sort_keys) for k, v in items}
    if isinstance(value, list | tuple):
        return [_with_marks(item, leaves, sort_keys) for item in value]
    return value


class _Mark(str):
    """A mark that is equal to no other, so that one object can have many as keys."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _escaped(leaf: Traced, ensure_ascii: bool) -> Traced:
    runs, parts, at = [], [], 0
    for length, origin in leaf._runs:
        part = json.dumps(str.__getitem__(leaf, slice(at, at + length)), ensure_ascii=ensure_ascii)[1:-1]
        parts.append(part)
        runs.append((len(part), origin))
        at += length
    return Traced("".join(parts), tuple(runs))
