"""Columns of a source's rows that its format reads nothing of, so that nobody finds out after the training that half of
a question stood in one of them.

    columns = Columns()
    made = convert(watched := columns.watched(row))     # for each row
    columns.saw(watched)                                # where it could be converted
    columns.unread                                      # how many rows say something there, by column

What a format reads is seen, not declared, so it holds for formats of one's own too: some rows are converted as dicts
that note what is asked of them.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

__all__ = ["Columns"]

MOST = 100
"""Columns, and sets of them, that are kept: a row for each of which every key is another one has no columns. And rows
that are watched because of a column: what is read may depend on what others say."""

Row = dict[str, Any]


class Columns:
    """What is read of the rows of one shard. `named` are columns that the recipe names, which are read whether or not
    these rows show it."""

    def __init__(self, named: Collection[str] = ()) -> None:
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._read = set(named)
        self._held: Counter[str] = Counter()

    def watched(self, row: Row) -> Row:
        """The row, as one that notes what is asked of it if it may have news: the 1st, 2nd, 4th, … of its columns, and
        the first that say something in a column of which nothing was read."""
        names = tuple(row)
        if names in self._seen or len(self._seen) < MOST:
            self._seen[names] += 1
            if self._seen[names].bit_count() == 1:
                return _Noting(row)
        unread = (name for name in names if name not in self._read and row[name] not in NOTHING)
        return _Noting(row) if any(self._held[name] < MOST for name in unread if name in self._held) else row

    def saw(self, watched: Row) -> None:
        """Count a row that was converted."""
        said = watched
        if isinstance(watched, _Noting):
            self._read |= watched.read
            said = watched.before
        for name, value in said.items():
            if name in self._read or value in NOTHING:
                continue
            if name in self._held or len(self._held) < MOST:
                self._held[name] += 1

    @property
    def unread(self) -> dict[str, int]:
        """Rows that say something there, by each column of which nothing was read."""
        return {name: self._held[name] for name in sorted(self._held.keys() - self._read)}


NOTHING: tuple[Any, ...] = (None, "", [], {})
"""What says nothing; CSV has no other way to leave a cell out."""


class _Noting(dict[str, Any]):
    """A row that knows which of its values were asked for. To know the names of its columns is not to read them."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.before = row
        """As it was: a format may take values out."""
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As any dict."""
        self.read.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        """As any dict."""
        self.read.add(name)
        return super().pop(name, *default)

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
