"""Columns of a source's rows that its format reads nothing of, so that nobody finds out after the training that half of
a question stood in one of them.

    columns = Columns(convert)
    columns.saw(row)          # each row that could be converted
    columns.unread            # how many rows have something there, by column

What a format reads is seen, not declared, so it holds for formats of one's own too: some of the rows with the same
columns are converted once more in a dict that notes what is asked of it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

__all__ = ["Columns"]

MOST = 100
"""Columns, and sets of them, that are kept: a row for each of which every key is another one has no columns."""

Row = dict[str, Any]


class Columns:
    """What is read of the rows of one shard."""

    def __init__(self, convert: Callable[[Row], Any], named: Collection[str] = ()) -> None:
        """`named` are columns that the recipe names, which are read whether or not these rows show it."""
        self._convert = convert
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._read = set(named)
        self._held: Counter[str] = Counter()

    def saw(self, row: Row) -> None:
        """Count a row that can be converted."""
        names = tuple(row)
        if names in self._seen or len(self._seen) < MOST:
            self._seen[names] += 1
            if self._seen[names].bit_count() == 1:  # the 1st, 2nd, 4th, …: what is read may depend on what others say
                noting = _Noting(row)
                self._convert(noting)
                self._read |= noting.read
        for name in names:
            if name not in self._read and row[name] is not None and (name in self._held or len(self._held) < MOST):
                self._held[name] += 1

    @property
    def unread(self) -> dict[str, int]:
        """Rows that have something in it, by each column of which nothing was read."""
        return {name: self._held[name] for name in sorted(self._held.keys() - self._read)}


class _Noting(dict[str, Any]):
    """A row that knows which of its values were asked for. To know the names of its columns is not to read them."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As any dict."""
        self.read.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # without it `{**row}` would copy past `__getitem__`

    def values(self) -> Any:
        """As any dict."""
        self.read |= super().keys()
        return super().values()

    def items(self) -> Any:
        """As any dict."""
        self.read |= super().keys()
        return super().items()
