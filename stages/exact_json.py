"""JSON at orjson's speed with the values that Python's own `json` gives.

orjson is asked first. It refuses some of what `json` takes (NaN, halves of surrogate pairs, UTF-16), and makes floats
of whole numbers that have more than 64 bits, and goes deeper into lists than Python may: then `json` decides.
"""

import json
from collections.abc import Callable
from typing import Any

import orjson

__all__ = ["dumps", "loads"]

_BITS_63 = float(1 << 63)
_DEEPEST = 900
"""Lists and objects within one another that both read for certain."""


def loads(data: bytes | str, constant: Callable[[str], Any] = float) -> Any:
    """What `json.loads` gives, with `constant` of "NaN", "Infinity" and "-Infinity". Raises what that raises."""
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data, parse_constant=constant)
    return json.loads(data, parse_constant=constant) if _is_doubtful(found) else found


def dumps(value: Any) -> str:
    """JSON text of a value that `loads` gave. Not of NaN, which JSON does not have: it becomes null."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # what only `json` can say
        return json.dumps(value)


def _is_doubtful(value: Any) -> bool:
    """Whether a value holds a float that may have been a whole number of more than 64 bits, or is very deep."""
    level: list[Any] = [[value]]
    for _ in range(_DEEPEST):
        deeper: list[Any] = []
        for some in level:
            for inner in some.values() if type(some) is dict else some:
                kind = type(inner)
                if kind is dict or kind is list:
                    deeper.append(inner)
                elif kind is float and abs(inner) >= _BITS_63:
                    return True
        if not deeper:
            return False
        level = deeper
    return True
